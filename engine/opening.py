"""From options to a worker that loads its model."""

import logging
from collections.abc import Callable
from dataclasses import replace

from engine.cores import set_threads
from engine.footprint import largest_workload
from engine.grammar_vocabulary import grammar_vocabulary
from engine.loading import load_within, read_storage
from engine.model.dtypes import parse_dtype
from engine.options import EngineOptions
from engine.planning import MemoryPlan
from engine.routing import record_routing
from engine.scheduler import Limits
from engine.ticket import Told, put_all
from engine.tokenizer import open_tokenizer
from engine.worker import LoadedModel, Worker

logger = logging.getLogger(__name__)


def start_worker(options: EngineOptions, deliver: Callable[[Told], None] = put_all) -> Worker:
    """Start the engine of a model; it loads in a thread of its own."""

    def log_plan(plan: MemoryPlan) -> None:
        for line in plan.summary():
            logger.info(line)

    def load(report_phase: Callable[[str], None]) -> LoadedModel:
        report_phase("reading weights")
        # before the weights: these are memory of the process, which the plan counts; and the first
        # request with a grammar should not wait for what takes up to a second
        stored = read_storage(options.model, max_model_len=options.max_model_len).config
        config = replace(stored, max_model_len=options.max_model_len or 0)
        tokenizer = open_tokenizer(options.model, config.tokenizer)
        grammar_vocabulary(tokenizer)  # type: ignore[arg-type]  # as all objects it has a hash
        loaded = load_within(
            options.model,
            parse_dtype(options.dtype),
            options.memory,
            options.gpu_memory,
            report_phase,
            log_plan,
            replace(largest_workload(config), adapter_bytes=options.adapter_memory),
            progress=worker.progress,
            max_rows=options.max_rows,
            invariant=options.invariant,
            beside_bytes=options.beside_bytes,
            max_model_len=options.max_model_len,
        )
        loaded.model.config = replace(loaded.model.config, max_model_len=config.max_model_len)
        close = loaded.close
        if options.record_routing is not None:
            recorder, path = record_routing(loaded.model), options.record_routing

            def close() -> None:
                loaded.close()
                recorder.save(path)
                logger.info("the routing is in %s", path)

        return LoadedModel(loaded.model, tokenizer, loaded.experts, loaded.plan, close)

    worker = Worker(
        options.name,
        load,
        max_queue=options.max_queue,
        max_queue_tokens=options.max_queue_tokens,
        stall_s=options.stall_s,
        limits=Limits(max_rows=options.max_rows, encoder_cache_bytes=options.encoder_cache),
        deliver=deliver,
    )
    set_threads(options.threads)
    worker.start()
    return worker
