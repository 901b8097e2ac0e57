"""Predicted seconds of one request on several devices, for each way to split it, by roofline.

A rank computes its branches of every step, or some rows of noise of each. What it receives of the
others is counted with the rate and the latency of the devices' link, as if nothing overlapped:

- velocities after each step, N x 16 values of each branch;
- under rows, keys and values of each layer, N rows of each branch;
- pixels of the decoded image, whose strips are divided among all ranks.

Of what `n` ranks gather, each receives `n - 1` parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..config import released_sizes
from ..errors import RequestError
from ..memory.autoencoder import VaeShape
from ..memory.cost import Estimate
from ..memory.device import less_margin
from ..memory.plan import MemoryPlan, typical_workload
from ..memory.planner import plan as fastest_plan
from ..parameters import PATCH_VALUES
from ..precision import Precision
from ..profiles import Profile
from ..schedule import ALL_BRANCHES, StepKind
from .layout import Layout, divide

_PIXEL = 3 * 4  # bytes: three values of float32
# A gain below this is within what a prediction can be wrong by.
_LEAST_GAIN = 1.02


@dataclass(frozen=True)
class Split:
    """A layout, with the predicted seconds of a request."""

    layout: Layout
    seconds: float
    communication: float  # seconds of these
    alone: float  # seconds on one device

    @property
    def gain(self) -> float:
        """How many times as fast as one device."""
        return self.alone / self.seconds

    @property
    def share(self) -> float:
        """Of the seconds that communication takes, 0 to 1."""
        return self.communication / self.seconds


def splits(estimate: Estimate, plan: MemoryPlan, ranks: int) -> list[Split]:
    """Every layout of so many ranks in which each has work, the fastest first.

    Args:
        estimate: of the request on one device.
        plan: by which each rank runs.
        ranks: how many devices there are.
    """
    predicted = [_Prediction(estimate, plan, one).split() for one in _layouts(estimate, ranks)]
    # of equally fast ones, that which exchanges less
    return sorted(predicted, key=lambda one: (one.seconds, one.communication))


def choose_layout(estimates: Sequence[Estimate], plan: MemoryPlan, ranks: int) -> Layout:
    """The layout of so many ranks with which some requests take least together.

    A layout with more parts of branches than a request has divides rows instead, see
    `Layout.for_groups`.

    Args:
        estimates: of each request on one device.
        plan: by which each rank runs.
        ranks: how many devices there are.
    """
    layouts = [Layout(one, ranks // one) for one in (3, 2, 1) if ranks % one == 0]

    def seconds(layout: Layout) -> float:
        return sum(_Prediction(one, plan, layout).split().seconds for one in estimates)

    return min(layouts, key=seconds)


def report(estimate: Estimate, plan: MemoryPlan, ranks: int) -> str:
    """The table that `omnigen-fast plan --gpus` prints.

    Raises:
        RequestError: there are more ranks than the request can be divided among.
    """
    found = splits(estimate, plan, ranks)
    if not found:
        raise RequestError(f"this request can't be divided among {ranks} devices; take fewer")
    best, profile = found[0], estimate.profile
    lines = [
        f"{ranks} devices over {profile.peer_link}, {profile.peer_bytes_per_second / 1e9:.1f} GB/s "
        f"(predicted; one alone takes {best.alone:.1f} s)",
        "",
        "         s   gain  communication  layout",
    ]
    for one in found:
        mark = "*" if one is best else " "
        lines.append(
            f"{mark} {one.seconds:8.1f} {one.gain:6.2f} {one.share:14.1%}  {words(one.layout)}"
        )
    if best.gain < _LEAST_GAIN:
        lines += ["", f"{_more(ranks)} nothing: {_reason(estimate, plan, best)}"]
    return "\n".join(lines)


def words(layout: Layout) -> str:
    """What is divided, into how many parts."""
    parts = {"branches": layout.branches, "rows": layout.rows}
    named = [f"{name} in {count}" for name, count in parts.items() if count > 1]
    return " and ".join(named) or "nothing divided"


def _more(ranks: int) -> str:
    return "a second device gains" if ranks == 2 else f"{ranks - 1} more devices gain"


def _reason(estimate: Estimate, plan: MemoryPlan, best: Split) -> str:
    if estimate.on_host:
        return "processes on one CPU share its cores"
    if best.share > 0.5:
        return "the exchange takes longer than what it saves"
    if estimate.seconds.copied_bytes(plan):
        return "each device waits for its own copies of streamed layers"
    return "launches take longer than the computation"


@dataclass(frozen=True)
class Cards:
    """Some cards of one kind, for the documents."""

    count: int
    profile: Profile


def gains(cards: Sequence[Cards], images: Sequence[int] = (0, 1, 2)) -> str:
    """The fastest layout of each request: a Markdown table."""
    lines = [
        "| cards | request | one card | layout | s | gain | communication |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in cards:
        for count in images:
            estimate, plan = _typical(one.profile, count)
            best = splits(estimate, plan, one.count)[0]
            request = "text" if not count else f"{count} input image{'s' * (count > 1)}"
            cells = [
                f"{one.count} x {one.profile.name}, {one.profile.peer_link}",
                request,
                f"{best.alone:.1f} s",
                words(best.layout),
                f"{best.seconds:.1f}",
                f"{best.gain:.2f}",
                f"{best.share:.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _typical(profile: Profile, images: int) -> tuple[Estimate, MemoryPlan]:
    """A picture of 1024 px in 50 steps on one such card."""
    decision = fastest_plan(
        released_sizes(),
        VaeShape(),
        Precision.of("bfloat16"),
        typical_workload(1024, 1024, images=images),
        profile,
        less_margin(profile.memory_bytes),
        kept_bytes=0,
    )
    return decision.estimate, decision.plan


def _layouts(estimate: Estimate, ranks: int) -> Iterator[Layout]:
    """Those in which each rank has a branch, or rows of one."""
    groups = sum(map(len, estimate.workload.branches))
    for branches in range(min(ranks, groups), 0, -1):
        rows, left = divmod(ranks, branches)
        if not left and rows <= estimate.workload.noise_tokens:
            yield Layout(branches, rows)


# Condition tokens of the groups of each pass; (rows, rows of keys) of each condition.
_Rank: TypeAlias = tuple[list[list[int]], list[tuple[int, int]]]


class _Prediction:
    """One layout of one request."""

    def __init__(self, estimate: Estimate, plan: MemoryPlan, layout: Layout) -> None:
        self._estimate, self._plan, self._layout = estimate, plan, layout
        self._profile, self._work = estimate.profile, estimate.workload
        # processes on one CPU take turns
        self._joined = sum if estimate.on_host else max

    def split(self) -> Split:
        seconds, plan = self._estimate.seconds, self._plan
        computing = sum(
            count * self._step(kind)
            for kind, count in self._work.schedule.counts.items()
            if kind.computed
        )
        if plan.cache != "none":
            computing += self._prefill()
        if self._work.images:  # each rank needs their latents
            computing += self._joined([seconds.encode_seconds(plan)] * self._layout.size)
        decoding = seconds.decode_seconds(plan)
        computing += decoding if self._estimate.on_host else decoding / self._layout.size
        communication = self._pixels() + sum(
            count * self._exchange(kind)
            for kind, count in self._work.schedule.counts.items()
            if kind.computed
        )
        return Split(
            layout=self._layout,
            seconds=computing + communication,
            communication=communication,
            alone=seconds.of(plan),
        )

    def _step(self, kind: StepKind) -> float:
        """Of one step on the rank that takes longest."""
        seconds, plan = self._estimate.seconds, self._plan
        layout, ranks = self._ranks(kind)
        queries = layout.most_rows(self._work.noise_tokens)
        found = []
        for passes, conditions in ranks:
            one = seconds.noise_work(plan, passes, queries).seconds
            if plan.cache == "none":
                one += seconds.prefill_work(conditions, 1, plan.mlp_rows).seconds
            one += seconds.expanding + seconds.contention(plan)
            found.append(max(one, seconds.copy_seconds(plan)))
        return self._joined(found * layout.rows)

    def _prefill(self) -> float:
        """Of the rank with the longest conditions; each rank of a branch keeps them whole."""
        seconds, plan = self._estimate.seconds, self._plan
        layout, ranks = self._ranks(ALL_BRANCHES)
        found = []
        for _, conditions in ranks:
            work = seconds.prefill_work(conditions, self._work.evaluations, plan.mlp_rows)
            one = work.seconds + seconds.expanding + seconds.contention(plan)
            found.append(max(one, seconds.copy_seconds(plan)))
        return self._joined(found * layout.rows)

    def _ranks(self, kind: StepKind) -> tuple[Layout, list[_Rank]]:
        """The layout of a kind of step, and what each of its parts of branches runs."""
        work = self._work
        # how many conditions of one length there are: pictures may have some in common
        copies = Counter(tokens for one in work.conditions for tokens in one.tokens)
        seen: Counter[int] = Counter()
        keys: dict[tuple[int, int], tuple[int, int]] = {}
        for picture, branches in enumerate(work.branches):
            for place, tokens in enumerate(branches):
                keys[picture, place] = tokens, min(seen[tokens], copies[tokens] - 1)
                seen[tokens] += 1
        units = [
            [[(place, keys[picture, place])] for place, _ in kind.places(picture, len(branches))]
            for picture, branches in enumerate(work.branches)
        ]
        division = divide(self._layout, units)
        return division.layout, [self._rank(part, keys) for part in division.parts]

    def _rank(
        self, part: Sequence[tuple[int, int]], keys: Mapping[tuple[int, int], tuple[int, int]]
    ) -> _Rank:
        own: dict[int, list[int]] = {}
        for picture, place in part:
            own.setdefault(picture, []).append(keys[picture, place][0])
        most = max(map(len, own.values()))
        size = min(self._plan.branches_per_pass or most, most)
        passes = [
            [tokens for one in own.values() for tokens in one[first : first + size]]
            for first in range(0, most, size)
        ]
        return passes, [(tokens, tokens) for tokens, _ in {keys[one]: None for one in part}]

    def _exchange(self, kind: StepKind) -> float:
        """Seconds of what the collectives of one step bring."""
        config, precision = self._estimate.config, self._estimate.precision
        layout, ranks = self._ranks(kind)
        rows = layout.most_rows(self._work.noise_tokens)
        most = max((passes for passes, _ in ranks), key=lambda one: sum(map(len, one)))
        value = PATCH_VALUES * precision.arithmetic_bytes
        total = self._gathered(sum(map(len, most)) * rows * value, layout.size)
        for tokens in most:
            pairs = len(tokens) * rows * self._estimate.bytes.pair
            total += config.num_layers * self._gathered(pairs, layout.rows)
        return total

    def _pixels(self) -> float:
        """Seconds of what the collective of a decode brings."""
        size = len(self._work.branches) * self._work.height * self._work.width * _PIXEL
        return self._gathered(size / self._layout.size, self._layout.size)

    def _gathered(self, each: float, ranks: int) -> float:
        """Seconds of a collective to which each rank sends so many bytes."""
        if ranks == 1:
            return 0.0
        profile = self._profile
        received = (ranks - 1) * each
        return profile.peer_latency_seconds + received / profile.peer_bytes_per_second
