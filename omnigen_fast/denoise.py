"""The denoising step: velocities of all guidance branches, guidance, and the Euler update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from .cache import Cache
from .config import PATCH
from .kernels import ops
from .memory.plan import MLP_ROWS
from .model import StepGroups, Transformer
from .parallel.exchange import ExchangeSpace, RowExchange, VelocityGather
from .parallel.group import Group
from .parameters import PATCH_VALUES
from .placement import Placement
from .schedule import ALL_BRANCHES, StepKind
from .sequence import lay_out
from .step_values import PassValues, PlacedBranch, StepValues, distinct_branches, span_of


class Velocity(Protocol):
    """Computes velocities of the noise tokens."""

    def __call__(
        self, values: StepValues, passes: Sequence[StepGroups], branches: Sequence[int]
    ) -> list[Tensor]:
        """Of each pass [groups, N, 16]: (row, column, channel) of each token's patch.

        Args:
            values: of the call.
            passes: what to run.
            branches: see `Passes`.
        """


class CachedVelocity:
    """From a cache that prefill has filled."""

    def __init__(self, model: Transformer, cache: Cache, branches: int) -> None:
        self._model, self._cache = model, cache
        self._staging = cache.staging(branches)

    def __call__(
        self, values: StepValues, passes: Sequence[StepGroups], branches: Sequence[int]
    ) -> list[Tensor]:
        self._cache.select_step(values.slots, values.time_rows, self._staging)
        return self._model.step(values.latents, values.pos_embed, passes, values.times, self._cache)


class RecomputedVelocity:
    """Computes the condition again in every step, layer by layer, in a cache of one layer."""

    def __init__(
        self,
        model: Transformer,
        cache: Cache,
        pictures: Sequence[Sequence[PlacedBranch]],
        image_latents: Mapping[str, Tensor],
        mlp_rows: int = MLP_ROWS,
    ) -> None:
        distinct = distinct_branches(pictures)
        self._model, self._cache = model, cache
        self._image_latents = image_latents
        sequences = [lay_out(b.branch, 1, span_of(b), model.device) for b in distinct]
        self._states = model.prefill_states(sequences, mlp_rows)
        self._time_rows = torch.tensor([span_of(b).times for b in distinct], device=model.device)
        self._staging = cache.staging(len(distinct))
        for one in image_latents.values():  # the table is on the host: a step would wait for it
            model.crop_pos_embed(*(side // PATCH for side in one.shape[1:]))

    def __call__(
        self, values: StepValues, passes: Sequence[StepGroups], branches: Sequence[int]
    ) -> list[Tensor]:
        time_token = values.times.tokens.index_select(0, values.step[:1])
        states = [self._states[i] for i in branches]
        for state in states:
            self._model.embed_condition(
                state.sequence, self._image_latents, time_token, out=state.residual
            )

        def select() -> None:
            self._cache.select_step(values.slots, self._time_rows, self._staging)

        return self._model.step_recomputed(
            values.latents,
            values.pos_embed,
            passes,
            values.times,
            states,
            select,
            self._cache,
        )


class Loop:
    """The steps of a call: its values, and the memory that all steps use again.

    Another call of the same shapes may take it over (`bind`) with what was captured.
    """

    def __init__(
        self,
        model: Transformer,
        values: StepValues,
        velocity: Velocity,
        mlp_rows: int = MLP_ROWS,
        placement: Placement | None = None,
    ) -> None:
        self.values = values
        self.busy = False  # whether a call that goes on takes its steps here
        self._velocity = velocity
        noise, like = values.noise_tokens, model.norm
        rows = max(one.rows for one in values.kinds.values())
        shared = {kind: one.shared for kind, one in values.kinds.items() if one.shared is not None}
        group = None if placement is None else placement.group
        longest = max(len(one.cos) for some in values.kinds.values() for one in some.passes)
        space = model.workspace(longest, mlp_rows)
        residual = like.new_empty(rows, model.config.hidden_size)
        sent = max([rows, *(one.sent for one in shared.values())])
        velocities = like.new_empty(sent, PATCH_VALUES)
        prediction: Tensor | None = None
        if not all(one.in_order for one in values.kinds.values()):
            groups = max(len(one.coefficient) for one in values.kinds.values())
            prediction = like.new_empty(groups, noise, PATCH_VALUES)
        self._groups: dict[StepKind, list[StepGroups]] = {}
        self._predictions: dict[StepKind, Tensor] = {}
        self._gathers: dict[StepKind, VelocityGather] = {}
        self._exchanged: list[Tensor] = []  # what travels between ranks
        exchanges: dict[StepKind, list[RowExchange | None]] = {}
        if group is not None:
            exchanges = self._exchanges(model, group, values)
            gathered = like.new_empty(group.size * sent, PATCH_VALUES)
            self._exchanged.append(gathered)
            for kind, own in shared.items():
                mine = velocities[: own.sent]
                self._gathers[kind] = VelocityGather(group, mine, gathered, own.places)
        for kind, passes in values.kinds.items():
            first, made = 0, []
            apart = exchanges.get(kind) or [None] * len(passes.passes)
            for one, exchange in zip(passes.passes, apart):
                part = slice(first, first + len(one.cos))
                made.append(
                    StepGroups(
                        pictures=one.pictures,
                        step=one.step,
                        cu_rows=one.cu_rows,
                        max_rows=len(one.cos) // len(one.pictures),
                        cache_start=one.cache_start,
                        cache_len=one.cache_len,
                        spans=_spans(one, exchange),
                        cos=one.cos,
                        sin=one.sin,
                        residual=residual[part],
                        values=velocities[part],
                        space=space,
                        noise=None if passes.shared is None else passes.shared.noise,
                        exchange=exchange,
                    )
                )
                first = part.stop
            self._groups[kind] = made
            if passes.in_order:
                self._predictions[kind] = velocities[:first].unflatten(0, (-1, noise))
            else:
                assert prediction is not None
                self._predictions[kind] = prediction[: len(passes.coefficient)]

    def _exchanges(
        self, model: Transformer, group: Group, values: StepValues
    ) -> dict[StepKind, list[RowExchange | None]]:
        """Of every pass, how its keys and values meet those of other rows; None without such."""
        split = [
            (one.shared.share, len(each.pictures))
            for one in values.kinds.values()
            for each in one.passes
            if one.shared is not None and one.shared.share.layout.rows > 1
        ]
        config = model.config
        like = model.norm.new_empty(0, 2 * config.num_kv_heads, config.head_dim)
        space = ExchangeSpace.of(split, like)
        self._exchanged += space.tensors()
        found: dict[StepKind, list[RowExchange | None]] = {}
        for kind, one in values.kinds.items():
            found[kind] = []
            for each in one.passes:
                exchange = None
                if one.shared is not None and one.shared.share.layout.rows > 1:
                    exchange = RowExchange(group, one.shared.share, len(each.pictures), space)
                    self._exchanged += exchange.tensors()
                found[kind].append(exchange)
        return found

    def predict(self, kind: StepKind = ALL_BRANCHES) -> Tensor:
        """Velocities of all groups, [groups, N, 16], until the next step."""
        passes, prediction = self.values.kinds[kind], self._predictions[kind]
        velocities = self._velocity(self.values, self._groups[kind], passes.branches)
        if kind in self._gathers:
            self._gathers[kind](prediction)
        elif not passes.in_order:
            for one, found in zip(passes.passes, velocities):
                prediction.index_copy_(0, one.places, found)
        return prediction

    def step(self, kind: StepKind = ALL_BRANCHES) -> None:
        """An evaluation and what the solver makes of it.

        Euler: `z += (t_{i+1} - t_i) * sum_b coefficient_b v_b(z, t_i)`.
        """
        values, solver, reuse = self.values, self.values.solver, self.values.reuse
        if reuse is not None and not kind.computed:
            assert solver is not None
            reuse.extrapolate(values.step, out=solver.velocity)
        else:
            self._combine(kind, values.latents if solver is None else solver.velocity.zero_())
        if reuse is not None and kind.computed:
            assert solver is not None
            reuse.keep_(solver.velocity, values.step)
        if solver is not None:
            solver.advance_(values.latents, values.step)
        if values.mask is not None:
            values.mask.blend_(values.latents, values.step)
        values.counters.add_(1)

    def _combine(self, kind: StepKind, moved: Tensor) -> None:
        """Adds the guided velocities of a step to `moved`, times the step's length."""
        values, computed = self.values, replace(kind, computed=True)
        passes = values.kinds[computed]
        ops.guidance_step_(
            moved,
            self.predict(computed) if kind.computed else self._predictions[computed],
            passes.coefficient,
            passes.cu_groups,
            values.lengths,
            values.step,
            PATCH,
        )

    def memory(self) -> list[Tensor]:
        """All tensors that the steps use."""
        found = [*self.values.tensors(), *self._predictions.values(), *self._exchanged]
        if self.values.solver is not None:
            found += [self.values.solver.velocity, self.values.solver.moved]
        for groups in self._groups.values():
            for one in groups:
                found += [one.residual, one.values, *one.space.tensors()]
        return found

    def bind(self, values: StepValues) -> None:
        """Takes the values of another call of the same shapes, whose steps come from now on."""
        for mine, theirs in zip(self.values.tensors(), values.tensors()):
            mine.copy_(theirs)
        for kind, passes in values.kinds.items():
            self._groups[kind] = [
                replace(groups, spans=_spans(one, groups.exchange))
                for groups, one in zip(self._groups[kind], passes.passes)
            ]


def _spans(one: PassValues, exchange: RowExchange | None) -> list[int]:
    """Of a pass, whose keys may come from other ranks too."""
    return one.spans(None if exchange is None else exchange.tokens)
