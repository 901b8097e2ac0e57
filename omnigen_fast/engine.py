"""Engine: calls carried out step by step.

It holds the weights, the autoencoder, the caches and captured steps, and moves them as plans want.
Calls are values: `start` one under a plan, `step` it until it is finished, then `finish` or `drop`
it. Several may be under way; a step of one may follow a step of another, or run together with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .cache import Cache, ConditionCache, Entry
from .call import Call
from .denoise import CachedVelocity, Loop, RecomputedVelocity, Velocity
from .errors import OmniGenError
from .graph import Runner
from .holdings import Holdings
from .images import InputImage
from .memory.plan import MemoryPlan
from .model import Transformer
from .packing import Member, Pack
from .precision import Precision
from .running import Running, left_by_steps
from .sequence import EncodedBranch, lay_out_all
from .step_values import MaskValues, PlacedBranch, StepValues
from .surroundings import isolated
from .vae.vae import Vae
from .weights.checkpoint import Checkpoint
from .weights.store import LayerStore

_KEPT_IMAGES = 256  # latents of input images; one of 1024 px takes 262 KB


class Engine(Holdings):
    """Carries out calls with one model on one device.

    Not for several threads at once: whoever drives it takes care of that.
    """

    @classmethod
    def of(
        cls,
        model: Transformer,
        checkpoint: Checkpoint,
        vae: Vae,
        condition_cache_bytes: int,
        precision: Precision | None = None,
        compile: bool | None = None,
    ) -> Engine:
        """An engine over a model that is on its device already; captures steps where it can.

        Args:
            model: whose weights `checkpoint` reads again where they move or adapters come.
            checkpoint: see the class; so are the others.
            precision: None for the dtype of the model.
            compile: see `Compilation`.
        """
        precision = precision or Precision.of(model.dtype)
        engine = cls(checkpoint, vae, precision, model.device, condition_cache_bytes, True, compile)
        engine._model = model
        engine._store = LayerStore(model, precision, engine._read, engine.host)
        engine.prepare_operations()
        return engine

    @isolated
    def start(self, call: Call, plan: MemoryPlan, own_rows: bool = False) -> Running:
        """Arranges everything as a plan wants it, and computes what does not depend on the noise.

        Args:
            call: at any step.
            plan: how it is carried out; with other calls under way, it must leave weights where
                they are.
            own_rows: takes copies of conditions that another call under way holds, so that the two
                can step together.

        Raises:
            BusyError: other calls are under way, and the plan moves what they use or they hold the
                rows that this one needs.
        """
        self.arrange(plan, call)
        self._notice_changes()
        if call.finished:
            cache = self._new_cache(layers=1)
            running = Running(call, plan, cache, (), None, None)
        else:
            with self.operations():
                running = self._prepared(call, plan, own_rows)
        self._running.append(running)
        return running

    @isolated
    def step(self, *running: Running) -> None:
        """Takes the next step of each call; steps of finished ones are no error."""
        for one in running:
            call = one.call
            if one.loop is None or one.runner is None or call.finished:
                continue
            with self.operations():
                for _ in range(call.schedule.per_step[call.steps_done]):
                    one.runner(call.schedule.kinds[call.steps_done])
            call.steps_done += 1
            call.finished = call.steps_done == len(call.schedule)

    @isolated
    def step_together(self, *running: Running) -> None:
        """Takes the next step of each call, all in one pass over the weights.

        Sums are in another order than alone: latents in float32 differ by 1e-6.

        Args:
            running: started with `own_rows`, of one `Running.like`, none of them finished.
        """
        assert len({one.like for one in running}) == 1 and running[0].like is not None
        members = tuple(_member(one) for one in running)
        if self._pack is None or not self._pack.takes(members):
            self._pack = None  # its memory first
            cache = running[0].cache
            assert isinstance(cache, ConditionCache)
            self._pack = Pack.of(self.model, cache, members, running[0].plan.mlp_rows)
        with self.operations():
            self._pack.step([one.call.schedule.first(one.call.steps_done) for one in running])
        for one in running:
            one.call.steps_done += 1
            one.call.finished = one.call.steps_done == len(one.call.schedule)

    @isolated
    def finish(self, running: Running) -> Tensor:
        """The latents of a call whose steps are over, checked; its rows are given back.

        Raises:
            OmniGenError: they hold NaN or infinities.
        """
        call = running.call
        call.latents.copy_(running.latents)
        self._let_go(running)
        if not finite(call.latents):
            self.forget()  # what is kept may hold some too
            raise OmniGenError(
                f"the latents hold NaN or infinities after step {call.steps_done} of "
                f"{len(call.schedule)}; the weights, a LoRA, the VAE or a callback may have made "
                "them"
            )
        return call.latents

    @isolated
    def decode(self, latents: Tensor, plan: MemoryPlan) -> Tensor:
        """Images [pictures, 3, height, width] in [0, 1] of a call that is finished.

        Raises:
            OmniGenError: the autoencoder gives pixels that are no numbers.
        """
        if not self._running:
            if plan.resident_layers < self.config.num_layers:
                self.store.stop()  # the ring's memory is the decoder's now
            if self.streamed is not None:
                self.streamed.free()
        with self.vae.loaded():
            group, store = self.placement.group, _strip_store(plan)
            if group is None:
                images = self.vae.decode(latents, plan.strip_rows, store=store)
            else:
                images = self.vae.decode_in_bands(latents, group, plan.strip_rows, store=store)
        if not finite(images.sum()):  # of values from 0 to 1
            raise OmniGenError(
                "the VAE gave pixels that are no numbers; its weights may be damaged"
            )
        return images

    @isolated
    def drop(self, running: Running) -> None:
        """Ends a call at any point; what it has computed of its condition stays for later ones."""
        if running in self._running:
            self._let_go(running)

    @isolated
    def end(self, call: Call) -> None:
        """Drops what is under way of a call, also where Ctrl-C came before `start` returned it."""
        for running in [one for one in self._running if one.call is call]:
            self._let_go(running)

    def _let_go(self, running: Running) -> None:
        self._running.remove(running)
        self._pack = None  # may be its last call
        running.cache.give_back(running.entries)
        if running.loop is not None:
            running.loop.busy = False
            running.loop = running.runner = None

    @isolated
    def recover(self) -> None:
        """After a failure: no copy is under way any more, what is kept can be used again."""
        self._pack = None
        for cache in (self.cache, self.streamed):
            if cache is not None:
                cache.reset()
                cache.hold(self._held_in(cache))
        if self._model is not None and self._model.stream is not None:
            self._model.stream.reset()

    def after_fork(self) -> None:
        """In a forked child: the threads that copy layers have stayed with the parent."""
        if self._model is not None:
            self._model.stream = None
        if self._store is not None:
            self._store.leave_lane()
        self.streamed = self._pack = None
        self._running.clear()

    def _prepared(self, call: Call, plan: MemoryPlan, own_rows: bool) -> Running:
        """Computes all that does not depend on the noise, or finds it kept."""
        schedule = call.schedule
        kinds = list({replace(kind, computed=True): None for kind in schedule.counts})
        entries = call.entries(plan, self.placement.conditions(kinds, call.branches))
        embedded = self.model.embed_times(schedule.evaluated_tensor().to(self.device))
        if plan.cache == "none":
            cache: Cache = self._new_cache(layers=1)
        else:
            cache = self.cache if plan.cache == "device" else self._streamed_cache()
        held = self._held_in(cache)
        twins: dict[Entry, Entry] = {}  # of copies that are to be made, what is copied
        if own_rows and isinstance(cache, ConditionCache):
            copies = {one: _unheld_copy(one, held) for one in entries}
            entries = {copies[one]: branches for one, branches in entries.items()}
            twins = {copy: one for one, copy in copies.items() if copy.copy}
        missing = [entry for entry in entries if entry not in held]  # or less, as `reserve` finds
        try:
            missing = cache.reserve(list(entries))
            if missing and plan.cache != "none":
                for copy in twins.keys() & set(missing):
                    assert isinstance(cache, ConditionCache)
                    cache.copy_rows(twins[copy], copy)
                wanted = {one: entries[one] for one in missing if one not in twins}
                if wanted:
                    self._prefill(plan, wanted, embedded.tokens, cache)
            placed = PlacedBranch.of(call.pictures, entries, cache)
            latents, mask = self._started(call, plan)
            values = StepValues.make(
                self.model,
                placed,
                latents,
                schedule.lengths().to(self.device),
                embedded,
                kinds,
                plan.branches_per_pass,
                self.placement,
                schedule=schedule,
                mask=mask,
            )
            for one, kept in zip(left_by_steps(call, values), call.history):
                one.copy_(kept)
            values.seek(schedule.first(call.steps_done))
            images = self._latents_of(plan, _images(entries)) if plan.cache == "none" else {}
            loop, runner = self._loop(call, plan, values, placed, images, cache)
        except BaseException:
            cache.discard(missing)  # the rows of some hold nothing
            cache.hold(held)  # an interrupt may have come before or after `reserve` held these
            raise
        loop.busy = True
        return Running(call, plan, cache, tuple(entries), loop, runner)

    def _held_in(self, cache: Cache) -> list[Entry]:
        """The entries of the calls under way, one for each call that has it."""
        return [entry for one in self._running if one.cache is cache for entry in one.entries]

    def _loop(
        self,
        call: Call,
        plan: MemoryPlan,
        values: StepValues,
        placed: Sequence[Sequence[PlacedBranch]],
        images: Mapping[str, Tensor],
        cache: Cache,
    ) -> tuple[Loop, Runner]:
        """What takes the steps: the loop of an earlier call of the same shapes, or a new one."""
        # what a ring copies in can't be recorded with the step
        fixed = cache if plan.capture and isinstance(cache, ConditionCache) else None
        loop = None if fixed is None else self.graphs.loop_for(values, fixed, plan.mlp_rows)
        if loop is None:
            if plan.cache == "none":
                velocity: Velocity = RecomputedVelocity(
                    self.model, cache, placed, images, plan.mlp_rows
                )
            else:
                velocity = CachedVelocity(self.model, cache, len(values.slots))
            loop = Loop(self.model, values, velocity, plan.mlp_rows, self.placement)
        if fixed is None:
            return loop, loop.step
        return loop, self.graphs.runner(loop, fixed, plan.mlp_rows, call.schedule.counts)

    def _prefill(
        self,
        plan: MemoryPlan,
        entries: Mapping[Entry, Sequence[EncodedBranch]],
        time_tokens: Tensor,
        cache: Cache,
    ) -> None:
        images = self._latents_of(plan, _images(entries))
        sequences = lay_out_all(entries, cache, self.device)
        with cache.filling(list(entries)):
            self.model.prefill(sequences, images, time_tokens, cache, plan.mlp_rows)

    def _started(self, call: Call, plan: MemoryPlan) -> tuple[Tensor, MaskValues | None]:
        """The latents that the next step starts from, and what keeps some of them to the input."""
        latents, edit, noise = call.latents.clone(), call.request.edit, call.noise
        if edit is None or noise is None:
            return latents, None
        known = self._latents_of(plan, [edit.image])[edit.image.digest]
        time = call.schedule.time(0)
        if not call.steps_done and time:
            latents = (1 - time) * noise + time * known
        if edit.mask is None:
            return latents, None
        return latents, MaskValues(
            edited=torch.from_numpy(edit.mask.latents).to(self.device),
            known=known.clone(),
            noise=noise.clone(),
            reached=torch.tensor(call.schedule.reached, dtype=torch.float32).to(self.device),
        )

    def _latents_of(self, plan: MemoryPlan, wanted: Iterable[InputImage]) -> dict[str, Tensor]:
        """Latents of images by digest; encodes those that are not kept.

        They are kept by their strips too: those of strips differ in the last bits.
        """
        kept = self.image_latents
        images = {image.digest: image for image in wanted}
        keys = {digest: (digest, plan.strip_rows) for digest in images}
        missing = [image for digest, image in images.items() if keys[digest] not in kept]
        if missing:
            with self.vae.loaded():
                for image in missing:
                    kept[keys[image.digest]] = self.vae.encode(
                        image, plan.strip_rows, store=_strip_store(plan)
                    )
        for key in keys.values():
            kept.move_to_end(key)
        latents = {digest: kept[key] for digest, key in keys.items()}
        while len(kept) > _KEPT_IMAGES:
            kept.popitem(last=False)
        return latents


def _unheld_copy(entry: Entry, held: Sequence[Entry]) -> Entry:
    """The first of an entry and its copies that no call holds; those before it are held."""
    copy = entry
    while copy in held:
        copy = replace(copy, copy=copy.copy + 1)
    return copy


def _member(running: Running) -> Member:
    call, loop = running.call, running.loop
    assert loop is not None
    return Member(loop.values, replace(call.schedule.kinds[call.steps_done], computed=True))


def _images(entries: Mapping[Entry, Sequence[EncodedBranch]]) -> Iterator[InputImage]:
    """Those of the branches, with repetition."""
    for branches in entries.values():
        for branch in branches:
            for _, _, image in branch.spans:
                yield image


def finite(tensor: Tensor) -> bool:
    """Whether all are numbers; so they are where only shapes are computed."""
    return tensor.is_meta or bool(tensor.isfinite().all())


def _strip_store(plan: MemoryPlan) -> torch.device | None:
    return torch.device("cpu") if plan.strips_on_host else None
