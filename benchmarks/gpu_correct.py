"""Does the project compute correctly on this device, and does its step keep the host from waiting? Parts of gpu_check.py."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from gpu_material import KINDS, Context, Row, Rows, encoder, row, triples
from schemes import Setting, project, tokens_of, watching
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from adaptive_margins.encoder.tokens import Tokens
from adaptive_margins.losses import CachedMarginLoss, MarginLoss

CHUNKS = 8  # profiles/paper.yaml
LIMITS = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.015}
"""Largest relative L2 error of a whole gradient."""
ADAM_LIMIT = 0.1
"""Largest relative L2 distance of what two optimisers have changed."""
TRIES = 12  # steps in which the loss scale of fp16 is halved until no gradient overflows

Gradients = dict[str, Tensor]


def relative_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖found − expected‖ / ‖expected‖ of all tensors together; a missing one is 0."""
    difference = norm = 0.0
    for name in found.keys() | expected.keys():
        a, b = (x.get(name) for x in (found, expected))
        zero = torch.zeros_like(a if b is None else b)
        a, b = (zero if x is None else x.double() for x in (a, b))
        difference += float((a - b).square().sum())
        norm += float(b.double().square().sum())
    return (difference / norm) ** 0.5 if norm else float("nan")


def gradients_of(model: nn.Module) -> Gradients:
    """A copy of a model's gradients, on the CPU."""
    named = ((name, p.grad) for name, p in model.named_parameters())
    return {name: g.detach().float().cpu().clone() for name, g in named if g is not None}


# ---- gradients -------------------------------------------------------------------------------------------------------


def reference(model: Any, tokens: tuple[Tokens, Tokens]) -> Gradients:
    """The gradient on the CPU in float32, by other code: a padded forward a column, eager attention, the loss written out."""
    model = copy.deepcopy(model).train()
    model[0].model.set_attn_implementation("eager")
    queries, passages = tokens
    size = len(queries)
    columns = ((queries, range(size)), (passages, range(size)), (passages, range(size, 2 * size)))
    q, p, n = (
        model(texts.batch(list(rows)))["sentence_embedding"].double() for texts, rows in columns
    )
    target = (1 + cosine_similarity(p[:, None], n[None], dim=-1)) / 2
    margin = cosine_similarity(q, p) - cosine_similarity(q, n)
    (margin[:, None] - target).square().mean().backward()
    return gradients_of(model)


class _FirstGradient(TrainerCallback):
    """The first gradient of a training that is finite, without the loss scale of fp16."""

    def __init__(self) -> None:
        self.found: Gradients | None = None
        self.scale = 1.0
        self.trainer: Any = None

    def of(self, trainer: Trainer) -> _FirstGradient:
        self.trainer = trainer
        return self

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        self.scale = float(scaler.get_scale()) if scaler is not None else 1.0
        found = {k: g / self.scale for k, g in gradients_of(self.trainer.model).items()}
        if all(bool(g.isfinite().all()) for g in found.values()):
            self.found = found

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_training_stop = self.found is not None
        return control


def step_gradients(model: Any, tokens: tuple[Tokens, Tokens], setting: Setting) -> Gradients:
    """The gradient of a step of this project's trainer."""
    watcher, size = _FirstGradient(), len(tokens[0])
    with watching(watcher.of):
        # All steps have the same triples.
        project(copy.deepcopy(model), tokens, size, TRIES, setting, CHUNKS)
    if watcher.found is None:
        raise RuntimeError(f"no finite gradient in {TRIES} steps, loss scale {watcher.scale:g}")
    return watcher.found


def gradients(context: Context) -> Rows:
    """A training step in each precision, of each kind of encoder, against `reference`."""
    for kind in KINDS:
        model = encoder(context, kind, dropout=0.0)
        tokens = tokens_of(model, triples(context.sizes, context.sizes.triples))
        expected = reference(model, tokens)
        for precision, limit in LIMITS.items():
            if precision == "fp16" and context.device == "cpu":
                yield row(f"{kind}, {precision}", limit=limit, reason="fp16 needs a GPU")
                continue

            def compute(setting: Setting) -> float:
                return relative_error(step_gradients(model, tokens, setting), expected)  # noqa: B023

            setting = Setting(context.device, precision)
            yield attempt(f"{kind}, {precision}", limit, partial(compute, setting))
            free(context)


def attempt(what: str, limit: float, compute: Callable[[], float], unit: str = "") -> Row:
    """The line of a value that is computed; an error is one that has failed."""
    try:
        return row(what, compute(), unit, limit=limit)
    except Exception as error:
        traceback.print_exc()
        return row(what, limit=limit, reason=one_line(error), failed=True)


def one_line(error: object) -> str:
    """An error with its type, on one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def free(context: Context) -> None:
    """Give memory of earlier trainings back."""
    gc.collect()  # trainers refer to themselves
    if context.device != "cpu":
        torch.cuda.empty_cache()


# ---- 8-bit Adam ------------------------------------------------------------------------------------------------------


def optimizer(context: Context) -> Rows:
    """What 8-bit Adam and torch's AdamW change in some dozen steps on the same triples."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield row("8-bit Adam", limit=ADAM_LIMIT, reason="bitsandbytes is not installed")
        return
    sizes = context.sizes
    size = 2 * sizes.triples
    model = encoder(context, "distilbert", dropout=0.0)
    tokens = tokens_of(model, triples(sizes, size * sizes.steps))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def change(name: str) -> Gradients:
        setting = Setting(context.device, "fp32", name)
        trained = project(copy.deepcopy(model), tokens, size, sizes.steps, setting, CHUNKS)
        free(context)
        return {k: v - before[k] for k, v in trained.states["last"].items()}

    def compute() -> float:
        return relative_error(change("adamw_8bit"), change("adamw_torch"))

    yield attempt(f"distilbert, {sizes.steps} steps of {size} triples", ADAM_LIMIT, compute)


# ---- CachedMarginLoss ------------------------------------------------------------------------------------------------


def cached(context: Context) -> Rows:
    """Loss and gradient of CachedMarginLoss against those of MarginLoss, on the device."""
    size = 2 * context.sizes.triples
    model = encoder(context, "distilbert", dropout=0.0).to(context.device).train()
    queries, passages = tokens_of(model, triples(context.sizes, size))
    parts = (
        queries.batch(range(size)),
        passages.batch(range(size)),
        passages.batch(range(size, 2 * size)),
    )
    columns = [{k: v.to(context.device) for k, v in part.items()} for part in parts]
    for target, in_batch in (("distributed", False), ("adaptive", True)):
        for precision in ("fp32", "bf16"):
            settings = {"target": target, "in_batch": in_batch}
            pair = (
                CachedMarginLoss(model, mini_batch_size=size // 4, **settings),
                MarginLoss(model, **settings),
            )

            def compute(pair: Any = pair, precision: str = precision) -> float:
                losses, found = zip(
                    *(_loss(model, p, columns, precision) for p in pair), strict=True
                )
                return max(abs(losses[0] / losses[1] - 1), relative_error(*found))

            what = f"{target}{', in-batch' if in_batch else ''}, {precision}"
            yield attempt(what, LIMITS[precision], compute)


def _loss(
    model: Any, loss: nn.Module, columns: list[dict[str, Tensor]], precision: str
) -> tuple[float, Gradients]:
    """A loss and its gradient, under autocast as the trainer has it."""
    model.zero_grad()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss([dict(column) for column in columns], None)
    value.backward()
    return float(value.detach()), gradients_of(model)


# ---- waits -----------------------------------------------------------------------------------------------------------

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
_FIRST = 3  # steps before waits are counted


class _Reads(TorchDispatchMode):
    """Calls ``note`` where a number is read: on a GPU, the host would wait for it."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _READS:
            self.note()
        return function(*args, **(kwargs or {}))


class _Waits(TrainerCallback):
    """Where the host waits for the device, from the end of a step to that of a later one, by `place`."""

    def __init__(self, device: str, counted: int) -> None:
        self.device, self.last = device, _FIRST + counted
        self.places: Counter[str] = Counter()
        self.open = self.works = False
        self.mode = _Reads(self.note)

    def note(self) -> None:
        self.places[place()] += 1

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step == _FIRST:
            self.start()
        elif state.global_step == self.last:
            self.stop()
        return control

    def start(self) -> None:
        self.open = True
        if self.device == "cpu":
            self.mode.__enter__()
        else:
            self.caught = warnings.catch_warnings()
            self.caught.__enter__()
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self.warned
        torch.ones((), device=self.device).item()  # is it seen?
        self.works = bool(self.places)
        self.places.clear()

    def warned(self, message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            self.note()

    def stop(self) -> None:
        if not self.open:
            return
        self.open = False
        if self.device == "cpu":
            self.mode.__exit__(None, None, None)
            return
        torch.cuda.set_sync_debug_mode("default")
        self.caught.__exit__(None, None, None)


def place() -> str:
    """The innermost line outside torch that is being executed, as module:line function."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("torch", "warnings", "contextlib", __name__):
            return f"{module}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def waits(context: Context) -> Rows:
    """Places where the host waits for the device in a step, from reading its batch to the optimiser."""
    sizes = context.sizes
    watcher = _Waits(context.device, sizes.counted)
    model = encoder(context, "distilbert", dropout=None)
    tokens = tokens_of(model, triples(sizes, 64 if context.device != "cpu" else sizes.triples))
    setting = Setting(context.device, "bf16", "adamw_8bit")

    def compute() -> float:
        size, steps = len(tokens[0]), watcher.last + 1
        try:
            with watching(lambda _: watcher):
                project(model, tokens, size, steps, setting, CHUNKS)
        finally:
            watcher.stop()
        if not watcher.works:
            raise RuntimeError("waits cannot be counted with this version of torch")
        places = watcher.places.items()
        return sum(n for name, n in places if name.startswith("adaptive_margins.")) / sizes.counted

    yield attempt("in this project's code", 0.0, compute, "a step")
    for name, number in watcher.places.most_common():
        yield row(name, number / sizes.counted, "a step")
