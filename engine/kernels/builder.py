"""Makes programs of the parts of a model, as they are stored."""

import numpy as np
import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels import ops
from engine.kernels.curves import ACTIVATIONS
from engine.kernels.processor import has_tiles
from engine.kernels.team import Table, the_team
from engine.kernels.tiles import DEPTH, ROWS, SUM_BYTES
from engine.model.attention import SelfAttention
from engine.model.layers import RMSNorm

KINDS = {torch.bfloat16: ops.BF16, torch.float32: ops.FP32}
TASKS_PER_THREAD = 4
CHUNK = 16  # outputs, of which a task has whole ones
TILE_ROWS = 5  # from which on tiles are faster than vectors


def real(value: float) -> int:
    """The bits of an fp64."""
    return int(np.float64(value).view(np.int64))


class Builder:
    """A program in the making. What it points at must outlive it: `kept` holds it.

    `is_exact`: a row gets the same bits alone and among others.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, is_exact: bool) -> None:
        self.config, self.dtype, self.is_exact = config, dtype, is_exact
        self.rows: list[Table] = []
        self.kept: list[Tensor] = []
        self._kind = KINDS[dtype]
        self._in_tiles = dtype == torch.bfloat16 and has_tiles() and not is_exact
        self._widths = [(0, 0)]  # numbers of fp32 and bf16 per row that products make room for

    def beside(self) -> "Builder":
        """An empty one for the same model."""
        return Builder(self.config, self.dtype, is_exact=self.is_exact)

    def __len__(self) -> int:
        return len(self.rows)

    def table(self) -> Table:
        """The program."""
        return np.stack(self.rows)

    def address(self, tensor: Tensor | None, *, keeps: bool = True) -> int:
        """Where a tensor begins; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError("a program takes tensors of host memory without gaps")
        if keeps:
            self.kept.append(tensor.detach())  # of its own: a parameter may be given other memory
        return tensor.data_ptr()

    def new(self, code: int) -> Table:
        """A new operation, still without columns of its own."""
        row = np.zeros(ops.COLUMNS, np.int64)
        row[0], row[ops.KIND] = code, self._kind
        self.rows.append(row)
        return row

    def put_norm(self, row: Table, column: int, norm: nn.Module | None) -> None:
        """Kind, weight and bias of a norm, which stand beside each other, and its eps."""
        if norm is None:
            return
        is_rms = isinstance(norm, RMSNorm)
        row[column] = 1 if is_rms else 2
        row[column + 1] = self.address(norm.weight)  # type: ignore[arg-type]  # a Tensor
        row[column + 2] = 0 if is_rms else self.address(norm.bias)  # type: ignore[arg-type]
        row[ops.REALS] = real(norm.eps)  # type: ignore[arg-type]

    def product(
        self,
        x_RI: Tensor,
        weight_OI: Tensor,
        out_RO: Tensor,
        *,
        bias_O: Tensor | None = None,
        norm: nn.Module | None = None,
        adds: bool = False,
        activation: str = "",
        gate: tuple[Tensor, Tensor | None, Tensor] | None = None,
    ) -> Table:
        """Out = activation(norm(x) weight + bias), or is added to what is there.

        `gate` has the weight and bias of a product that is multiplied by it, and room for it.
        """
        row, (outputs, length) = self.new(ops.PRODUCT), weight_OI.shape
        row[ops.P_X], row[ops.P_X_STRIDE] = self.address(x_RI), 4 * x_RI.stride(0)
        row[ops.P_LENGTH], row[ops.P_OUTPUTS] = length, outputs
        self.put_norm(row, ops.P_NORM, norm)
        row[ops.P_MATRIX] = self.address(weight_OI)
        row[ops.P_STRIDE] = weight_OI.stride(0) * weight_OI.element_size()
        row[ops.P_BIAS] = self.address(bias_O)
        row[ops.P_OUT], row[ops.P_OUT_STRIDE] = self.address(out_RO), 4 * out_RO.stride(0)
        row[ops.P_ADDS] = adds
        row[ops.P_ACTIVATION] = ACTIVATIONS.index(activation) + 1 if activation else 0
        if gate is not None:
            weight, bias, room = gate
            row[ops.P_GATE], row[ops.P_GATE_BIAS] = self.address(weight), self.address(bias)
            row[ops.P_GATE_OUT] = self.address(room)
        tasks = the_team().threads * TASKS_PER_THREAD
        chunk = max(outputs // tasks // CHUNK * CHUNK, CHUNK)
        row[ops.P_CHUNK], row[ops.TASKS] = chunk, -(-outputs // chunk)
        row[ops.P_TILES] = TILE_ROWS if self.can_tile(length) else 0
        width = (length if norm else 0) + (outputs if adds else 0)
        self._widths.append((width, length))
        return row

    def can_tile(self, length: int) -> bool:
        """Whether rows of a length may be multiplied in tiles."""
        return self._in_tiles and length % DEPTH == 0

    def pack_rows(self, length: int) -> None:
        """Have room for packed rows of a length."""
        self._widths.append((0, length))

    def scratch_bytes(self, rows: int) -> int:
        """What a thread needs for products of so many rows."""
        whole = -(-rows // ROWS) * ROWS
        most = max(4 * rows * width + 2 * whole * length for width, length in self._widths)
        return most + SUM_BYTES

    def linear(
        self,
        x_RI: Tensor,
        layer: nn.Linear,
        out_RO: Tensor,
        *,
        norm: nn.Module | None = None,
        adds: bool = False,
    ) -> None:
        """The product of a layer."""
        self.product(x_RI, layer.weight, out_RO, bias_O=layer.bias, norm=norm, adds=adds)

    def norm(self, x_RD: Tensor, norm: nn.Module, out_RD: Tensor) -> None:
        """A norm."""
        row = self.new(ops.NORM)
        row[ops.N_X], row[ops.N_X_STRIDE] = self.address(x_RD), 4 * x_RD.stride(0)
        row[ops.N_LENGTH] = x_RD.shape[1]
        self.put_norm(row, ops.N_NORM, norm)
        row[ops.N_OUT], row[ops.N_OUT_STRIDE] = self.address(out_RD), 4 * out_RD.stride(0)

    def attention(
        self, qkv_RI: Tensor, kv_heads: int, out_RI: Tensor, *, code: int = ops.ATTEND
    ) -> Table:
        """Attention of heads, or a part of it, still without keys and values."""
        config, row = self.config, self.new(code)
        row[ops.A_QKV], row[ops.A_QKV_STRIDE] = self.address(qkv_RI), 4 * qkv_RI.stride(0)
        row[ops.A_HEADS], row[ops.A_KV_HEADS] = config.num_heads, kv_heads
        row[ops.A_WIDTH] = config.d_kv
        row[ops.A_OUT], row[ops.A_OUT_STRIDE] = self.address(out_RI), 4 * out_RI.stride(0)
        row[ops.A_SCALE] = real(config.attention_scale)
        return row

    def put_attention(
        self, row: Table, layer: SelfAttention, index: int, turns: Tensor | None
    ) -> None:
        """What is special of a layer's attention: norms of heads, turns, its window, sinks."""
        config = self.config
        if config.query_key_norm == "head":
            row[ops.A_QUERY_NORM] = self.address(layer.query_norm.weight)
            row[ops.A_KEY_NORM] = self.address(layer.key_norm.weight)
            row[ops.A_EPS] = real(config.norm_eps)
        if turns is not None:
            cosines, sines = turns
            row[ops.A_COS], row[ops.A_SIN] = self.address(cosines), self.address(sines)
            row[ops.A_HALF] = cosines.shape[1]
        if config.windows:
            row[ops.A_WINDOW] = config.windows[index]
        if config.attention_sinks:
            row[ops.A_SINKS] = self.address(layer.sinks)

    def width_fix(self, qkv: Tensor, layer: SelfAttention) -> None:
        """Norms over all queries and over all keys of a row, then bounds."""
        config, row = self.config, self.new(ops.WIDTH_FIX)
        row[ops.W_QKV], row[ops.W_QKV_STRIDE] = self.address(qkv), 4 * qkv.stride(0)
        row[ops.W_QUERIES] = config.num_heads * config.d_kv
        row[ops.W_KEYS], row[ops.W_ALL] = config.kv_heads * config.d_kv, qkv.shape[1]
        if config.query_key_norm == "width":
            row[ops.W_QUERY_NORM] = self.address(layer.query_norm.weight)
            row[ops.W_KEY_NORM] = self.address(layer.key_norm.weight)
        row[ops.W_CLIP], row[ops.W_EPS] = real(config.clip_qkv), real(config.norm_eps)
