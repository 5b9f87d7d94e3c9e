"""The run of Safe LoRA: measure all modules, choose, rewrite the chosen; one module in memory per thread."""

from __future__ import annotations

import bisect
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from threading import Lock, local
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from holdfast.defenses.safe_lora_parts.projection import (
    BLOCK,
    Direction,
    Matrix,
    Measured,
    NotFinite,
    Workspace,
    approx,
    exact,
    measure,
    normalised,
    update_norm,
)
from holdfast.defenses.safe_lora_parts.result import IDENTITY, ModuleResult, suggest
from holdfast.defenses.safe_lora_parts.updates import Sources, Update
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.seeds import derive_seed
from holdfast.weights.adapter import natural
from holdfast.weights.floats import to_float32
from holdfast.weights.reader import Tensor

if TYPE_CHECKING:
    from holdfast.defenses.safe_lora_parts.config import SafeLoraConfig

NO_DIRECTION = "V is zero"
NO_UPDATE = "The update is zero"
KEPT = 2**26
"""Bytes of products that are kept for the least similar modules until all modules are measured."""


class Work:
    """Measures all modules, chooses, and rewrites the chosen ones; one module in memory per thread.

    `write` replaces the bytes of a tensor in the result. Without it, nothing is written.
    """

    def __init__(
        self,
        sources: Sources,
        config: SafeLoraConfig,
        write: Callable[[Tensor, NDArray[np.uint8]], None] | None,
        device: str,
        dtype: str,
        workers: int | None,
        progress: Callable[[int, int], None],
    ):
        self.sources, self.config, self.write, self.device = sources, config, write, device
        self.dtype, self.progress, self.mine = dtype, progress, local()
        # A dense product or an eigen-decomposition is large, and BLAS spreads it over the cores itself.
        self.heavy = sources.full or config.projection == "exact"
        self.workers = workers or (1 if self.heavy else min(4, _cores()))
        self.block = 8 * BLOCK if sources.full else BLOCK
        computed = config.projection != "exact" and config.control is None
        self.least = Least(config.num_layers if write and computed else None)

    def run(self) -> tuple[tuple[ModuleResult, ...], dict[str, Any], tuple[str, ...]]:
        """The modules, the options that were decided on the way, and notes."""
        # The modules are spread over threads here; several BLAS threads only slow down their products, which
        # have few columns (eight times the processor time on a busy machine).
        with nullcontext() if self.heavy else threadpool_limits(1, user_api="blas"):
            return self._run()

    def _run(self) -> tuple[tuple[ModuleResult, ...], dict[str, Any], tuple[str, ...]]:
        updates = self.sources.updates
        modules = self.each(self.look, updates)
        if all(module.direction_norm == 0 for module in modules):
            raise ModelError(
                "Base and aligned are the same in every module that was fine-tuned, so there is no direction "
                "to project onto. Give the model before alignment as the base."
            )
        chosen, options, notes = choose(modules, self.config)
        left = [
            (update, module)
            for update, module in zip(updates, modules, strict=True)
            if module.name in chosen and not module.projected
        ]
        if self.write is None:
            modules = [replace(module, projected=module.name in chosen) for module in modules]
        elif left:
            done = {module.name: module for module in self.each(self.redo, left)}
            modules = [done.get(module.name, module) for module in modules]
        return tuple(modules), options, (*self.sources.notes, *notes, *remarks(modules))

    def each(self, function: Callable[[Any], ModuleResult], items: Sequence[Any]) -> list[ModuleResult]:
        """Apply `function` to every item in threads, in order; the first error stops the rest."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(function, item) for item in items]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                self.progress(done, len(items))
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def look(self, update: Update) -> ModuleResult:
        """Measure a module, and rewrite it immediately if the threshold alone decides."""
        direction = self.direction(update)
        b, a, scaling = update.load(np.dtype(self.dtype))
        try:
            measured = measure(direction, b, a)
        except NotFinite as error:
            raise ModelError(
                f"'{update.name}': {error} holds values that are not finite. Save or fetch the weights again."
            ) from None
        found = ModuleResult(
            update.name, update.kind, update.layer, measured.cosine, False,
            measured.norm * scaling, measured.norm * scaling, measured.direction_norm,
            None if a is None else a.shape[0], note=_nothing(measured),
        )  # fmt: skip
        config, threshold = self.config, self.config.threshold
        self.least.add(update.name, measured)
        if self.write is None or config.control == "random" or not isinstance(threshold, int | float):
            return found
        if measured.cosine is None or measured.cosine >= threshold:
            return found
        return self.replace(update, found, direction, (b, a, scaling), measured)

    def redo(self, item: tuple[Update, ModuleResult]) -> ModuleResult:
        """Rewrite a module that was chosen after all modules were measured."""
        update, found = item
        factors = update.load(np.dtype(self.dtype))
        return self.replace(update, found, self.direction(update), factors, self.least.get(update.name))

    def replace(
        self,
        update: Update,
        found: ModuleResult,
        direction: Direction,
        factors: tuple[Matrix, Matrix | None, float],
        measured: Measured | None,
    ) -> ModuleResult:
        """Write the projected update; measure again if `measured` was not kept."""
        assert self.write is not None
        (b, a, scaling), rank = factors, None
        if self.config.control == "drop":
            new = np.zeros_like(b)
        elif self.config.projection == "exact":
            new, rank = exact(direction, b)
        else:
            project = {"approx": approx, "normalised": normalised}[self.config.projection]
            new = project(measured or measure(direction, b, a))
        if new is not b:  # otherwise it stays unchanged byte for byte
            values = update.encode(new)
            if not np.isfinite(to_float32(values, update.target.dtype)).all():
                raise ModelError(
                    f"'{update.name}' does not fit into {update.target.dtype} after projection. Save the "
                    "adapter in float32 or bfloat16."
                )
            self.write(update.target, values)
        note = IDENTITY if new is b else None
        after = update_norm(new, a) * scaling
        return replace(found, projected=True, norm_after=after, direction_rank=rank, note=note)

    def direction(self, update: Update) -> Direction:
        """Return V of a module, with the buffers of this thread."""
        if not hasattr(self.mine, "space"):
            self.mine.space = Workspace(self.dtype, self.block)
        if self.device == "cpu":
            return update.pair.direction(self.mine.space)
        from holdfast.defenses.safe_lora_parts.on_device import on_device

        return on_device(update.pair, self.mine.space, self.device)


class Least:
    """The measurements of the `most` least similar modules so far, in at most `room` bytes.

    A module that is dropped is measured again if it is chosen in the end.
    """

    def __init__(self, most: int | None, room: int | None = None):
        self.most, self.room = most or 0, KEPT if room is None else room
        self._lock = Lock()
        self._kept: list[tuple[float, str, Measured]] = []
        self._bytes = 0

    def add(self, name: str, measured: Measured) -> None:
        """Keep a measurement in place of a more similar one, or drop it."""
        if not self.most or measured.cosine is None or measured.moved is None:
            return
        with self._lock:
            bisect.insort(self._kept, (measured.cosine, name, measured), key=lambda kept: kept[:2])
            self._bytes += measured.moved.nbytes
            while len(self._kept) > self.most or self._bytes > self.room:
                moved = self._kept.pop()[2].moved
                assert moved is not None
                self._bytes -= moved.nbytes

    def get(self, name: str) -> Measured | None:
        """Return the measurement of a module, if it is still kept."""
        return next((measured for _, kept, measured in self._kept if kept == name), None)


def _cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(
    modules: Sequence[ModuleResult], config: SafeLoraConfig
) -> tuple[set[str], dict[str, Any], list[str]]:
    """Return the names of the modules to project, the options that this decided, and notes.

    Raises:
        RecipeError: more modules are requested than exist, or there is no gap for a suggestion.
    """
    order = sorted((m.cosine, natural(m.name), m.name) for m in modules if m.cosine is not None)
    options, notes, threshold = {}, [], config.threshold
    if threshold == "suggest":
        suggestion = suggest([cosine for cosine, _, _ in order])
        if suggestion is None:
            raise RecipeError("Safe LoRA: all cosines are the same, so no threshold can be suggested.")
        threshold = options["threshold"] = suggestion.threshold
        notes.append(f"Threshold {threshold:g}: {suggestion.why}.")
    if config.num_layers is not None:
        try:
            config.check_modules(len(order))
        except ValueError as error:
            raise RecipeError(f"Safe LoRA: {error}.") from None
        chosen = [name for _, _, name in order[: config.num_layers]]
        last = order[config.num_layers - 1]
        tied = [name for cosine, _, name in order[config.num_layers :] if cosine == last[0]]
        if tied:
            notes.append(
                f"Tie at cosine {last[0]:.6g}: {last[2]} was chosen, by name, not {', '.join(tied[:5])}."
            )
    elif threshold is not None:
        chosen = [name for cosine, _, name in order if cosine < float(threshold)]
        if not chosen and order:
            notes.append(
                f"No module is below {float(threshold):g}: the smallest cosine is {order[0][0]:.4g} "
                f"({order[0][2]}). Nothing was projected."
            )
    else:
        chosen = []
    if config.control == "random":
        draw = random.Random(derive_seed(config.seed, "safe_lora", "random"))
        chosen = draw.sample([name for _, _, name in order], len(chosen))
        notes.append(f"Control: {len(chosen)} modules were chosen at random (seed {config.seed}).")
    if config.control == "drop":
        notes.append("Control: the chosen updates were set to zero instead of being projected.")
    return set(chosen), options, notes


def remarks(modules: Sequence[ModuleResult]) -> Iterator[str]:
    """Yield sentences on modules that could not be projected, or that the projection did not change."""
    for reason in (NO_DIRECTION, NO_UPDATE):
        names = [module.name for module in modules if module.note == reason]
        if names:
            more = ", ..." if len(names) > 1 else ""
            yield f"{reason} in {len(names)} of {len(modules)} modules, left as they are: {names[0]}{more}."
    same = sum(module.note == IDENTITY for module in modules)
    if same:
        yield (
            f"{IDENTITY} in {same} of the {sum(m.projected for m in modules)} chosen modules, which did not "
            "change. Use 'approx' or 'normalised'."
        )


def _nothing(measured: Measured) -> str | None:
    if measured.cosine is not None:
        return None
    return NO_DIRECTION if measured.direction_norm == 0 else NO_UPDATE
