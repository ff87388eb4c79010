"""One trained model against the validation text of its recipe: what `evaluate` writes.

In:    a finished model, the documents, the token files that it was trained on.
Out:   eval.json (nine numbers, the same keys for every family), eval_record.json (all that they
       were made from), samples.json, depth.csv, examples/ (a line for each decision of cloze and
       CORE). No time, rate, device or path in any of them.
Rule:  every rank scores, rank 0 writes; what belongs together is compared by hash (inputs.py)
       before the first forward pass.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import torch

from lib.core import files
from lib.core.errors import InputError, UserError
from lib.core.stage import Run
from lib.eval import baselines, bpb
from lib.eval.bpb import LEAST_BYTES, Measured, Ranks
from lib.eval.controls import write_controls
from lib.eval.depth import ExitScorer, write_depth
from lib.eval.exams import Examiner, Marks
from lib.eval.inputs import Inputs
from lib.eval.scorer import Rules, Scorer
from lib.eval.speed import measure_speed
from lib.export.samples import language_of, make_samples
from lib.nn.stream import for_reading
from lib.train import parallel
from lib.train.precision import pick_device

RECORD, SAMPLES, DEPTH = "eval_record.json", "samples.json", "depth.csv"
SPEED = "speed.json"  # beside the receipt, never among metrics
S = TypeVar("S", bound=Scorer)


def evaluate(run: Run) -> None:
    """Measure the model of `run` and write its files; every rank scores, rank 0 writes."""
    settings, device = run.settings.eval, pick_device(run.runtime.device)
    torch.set_num_threads(run.runtime.threads)
    parallel.start(device)
    try:
        inputs = Inputs.open(run)
        dtype = eval_dtype(settings.dtype, device)
        model = inputs.final.model(device, dtype, for_reading(run.runtime.stream))
        rules = Rules.of(
            inputs.tokenizer, inputs.store.boundary, inputs.context, settings.bpb.stride
        )
        start = time.perf_counter()
        measured = measure_text(run, inputs, model, rules, device, dtype)
        seconds = {"bpb": time.perf_counter() - start}
        marks = Examiner(
            run=run, inputs=inputs, model=model, rules=rules, device=device, dtype=dtype
        ).examine()
    finally:
        parallel.stop()
    if not parallel.is_first():
        return
    record = record_of(inputs, model, rules, dtype, measured) | marks.record
    record["baselines"] = compare(run, inputs, rules, measured.total_bytes)
    said = "null" if measured.bpb is None else f"{measured.bpb:.4f}"
    told = ", ".join(f"{k} {v:.4f}" for k, v in record["baselines"]["bpb"].items() if v is not None)
    run.log(f"bits per byte: {said} on {measured.total_bytes:,} bytes; beside it {told}")
    beside = run.files_beside("records")
    files.write_json(beside / RECORD, record)
    if verdict := write_controls(run.inputs["model"], beside):
        run.log(verdict)
    start = time.perf_counter()
    exits = scorer_of(ExitScorer, run, inputs, model, rules, device, dtype)
    write_depth(beside / DEPTH, measured, exits, inputs.texts(), inputs.tokenizer)
    seconds["depth"] = time.perf_counter() - start
    start = time.perf_counter()
    if settings.samples:
        write_samples(run, inputs, model, rules, device)
    seconds |= {**marks.seconds, "samples": time.perf_counter() - start}
    speed = measure_speed(model, inputs.context, device, dtype)
    files.write_json(run.work / SPEED, {"seconds": seconds, **speed})
    files.write_json(run.result, metrics_of(inputs, model, measured, marks))


def write_samples(run: Run, inputs: Inputs, model: Any, rules: Rules, device: torch.device) -> None:
    """samples.json: what the model says by itself."""
    first = [] if rules.boundary_id is None else [rules.boundary_id]
    language = language_of(text for _, text in inputs.texts())
    samples = make_samples(model, inputs.tokenizer, first, language, device)
    files.write_json(run.files_beside("records") / SAMPLES, samples)


def eval_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the matmuls: auto is fp32 on a CPU and bf16 elsewhere."""
    if name == "auto":
        name = "fp32" if device.type == "cpu" else "bf16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def measure_text(
    run: Run,
    inputs: Inputs,
    model: Any,
    rules: Rules,
    device: torch.device,
    dtype: torch.dtype,
) -> Measured:
    """Nats of every validation document; without nats, but counted, for a lossy tokenizer."""
    total = sum(len(text.encode()) for _, text in inputs.texts())
    if total == 0:
        raise InputError(
            "no validation text", file=inputs.documents, value="0 bytes", remedy="add documents"
        )
    if total < LEAST_BYTES:
        raise UserError(
            "validation text is too short to mean anything",
            file=inputs.documents,
            value=f"{total} bytes, {LEAST_BYTES} are the least",
            remedy="give the recipe more validation documents",
        )
    if not inputs.tokenizer.lossless:
        return bpb.count_only(inputs.texts(), inputs.tokenizer)
    scorer = scorer_of(Scorer, run, inputs, model, rules, device, dtype)
    with run.progress(total, "bytes") as advance:
        return bpb.measure(
            inputs.texts(),
            inputs.tokenizer,
            scorer,
            ranks=Ranks.current(device),
            units=run.units,
            advance=advance,
        )


def scorer_of(
    kind: type[S], run: Run, inputs: Inputs, model: Any, rules: Rules, device: Any, dtype: Any
) -> S:
    """A scorer of `kind` as the run's settings have it."""
    return kind(
        model=model,
        rules=rules,
        token_bytes=inputs.tokenizer.token_bytes,
        device=device,
        dtype=dtype,
        budget_tokens=run.runtime.eval_tokens,
        warn=run.warn,
    )


def record_of(
    inputs: Inputs, model: Any, rules: Rules, dtype: torch.dtype, measured: Measured
) -> dict[str, Any]:
    """eval_record.json, the baselines apart."""
    record: dict[str, Any] = {
        **measured.record(),
        "context": rules.context,
        "stride": rules.stride,
        "boundary": inputs.store.boundary,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": inputs.tokenizer.fingerprint,
        "model": inputs.final.sha256,
        "family": inputs.final.family,
        "params": split_params(model, rules.vocab_size),
    }
    if measured.bpb is None:
        share = bpb.round_trip_share(inputs.texts(), inputs.tokenizer)
        record["reason"] = "the tokenizer is lossy: its ids do not hold the text"
        record["round_trip_share"] = share
    return record


def split_params(model: torch.nn.Module, vocab_size: int) -> dict[str, int]:
    """Parameters by kind: tables with a row for each id (embeddings, head), frozen, the rest."""
    counts = {"embedding": 0, "other": 0, "frozen": 0}
    for parameter in model.parameters():
        is_table = parameter.ndim == 2 and parameter.shape[0] >= vocab_size
        kind = "embedding" if is_table else "other"
        counts[kind if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def compare(run: Run, inputs: Inputs, rules: Rules, total_bytes: int) -> dict[str, Any]:
    """Compressors and a bigram of the training ids on the same text; kept over a kill."""
    path = run.units / "baselines.json"
    if kept := files.read_note(path):
        return kept
    found: dict[str, float | None] = {}
    found |= baselines.compressed_bpb((text for _, text in inputs.texts()), total_bytes)
    length = inputs.store.length("train")
    used = min(length, baselines.TRAIN_IDS)
    found["bigram"] = None
    if inputs.tokenizer.lossless:
        chunks = baselines.read_chunks(
            lambda start, count: inputs.store.tokens("train", start, count), length
        )
        bigram = baselines.Bigram.count(chunks, rules.vocab_size)
        found["bigram"] = baselines.bigram_bpb(inputs.texts(), inputs.tokenizer, rules, bigram)
    result = {"bpb": found, "bigram_train_ids": used}
    files.write_note(path, result)
    return result


def metrics_of(
    inputs: Inputs, model: Any, measured: Measured, marks: Marks
) -> dict[str, float | int | None]:
    """eval.json: exactly nine keys; null is what has not been measured."""
    provenance = inputs.final.provenance
    numbers = {
        "bpb": measured.bpb,
        **marks.numbers,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "train_flops": provenance.get("train_flops"),
        "train_tokens": provenance.get("train_tokens"),
        "val_bytes": measured.total_bytes,
    }
    return {name: ten_digits(value) for name, value in numbers.items()}


def ten_digits(value: float | int | None) -> float | int | None:
    """`value` to 10 significant digits; integers that have no more stay integers."""
    if value is None or (isinstance(value, int) and abs(value) < 10**10):
        return value
    return float(f"{value:.10g}")
