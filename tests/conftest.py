import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: more threads cost more than they give
settings.register_profile("shared", deadline=None)  # a busy machine is no failure
settings.load_profile("shared")
