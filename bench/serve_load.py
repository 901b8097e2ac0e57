"""A load test of the server: how long requests take, and who waits for whom.

    python -m bench.serve_load && python -m bench.docs

Requests of mixed sizes and tasks arrive at random moments, whether or not earlier ones are finished
(an open loop), drawn from a seed: four in five are short, the others take so many steps that they
last ten times as long.
The same requests go to the same server with its own policy, with first come, first served, and with
either of them without packing, in turns. Then many requests of one size arrive at once, which shows
what packing gains. The command fails if the servers' pictures differ. It writes
bench/results/serve-load.json, which docs/benchmarks.md shows, and a plot.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .common import RESULTS, ROOT, machine

RESULT = RESULTS / "serve-load.json"
PLOT = ROOT / "bench" / "plots" / "serve-load.png"
BEGIN, END = "<!-- serve-load: begin -->", "<!-- serve-load: end -->"

VARIANTS = {
    "shortest first, packed": (),
    "shortest first": ("--no-packing",),
    "first come, first served, packed": ("--policy", "fcfs"),
    "first come, first served": ("--policy", "fcfs", "--no-packing"),
}
OWN, UNPACKED, PACKED_FIRST_COME, FIRST_COME = VARIANTS
LONGER = 10  # times the seconds
SHARE_OF_LONG = 0.2
_WAIT = 300.0  # seconds, for any answer
_TRIED = 4  # times the steps, to see what a step takes
_LEVELS = 1  # of 255: pictures made beside others differ by rounding
_AT_ONCE = 16  # requests of one size
_PROMPTS = (
    "A large red star at the top left.",
    "A small blue circle at the bottom right.",
    "A large green square at the top right and a small yellow star at the bottom left.",
)
_EDIT = "Change the background of <img><|image_1|></img> to blue."


@dataclass(frozen=True)
class Kind:
    """A size and a task."""

    task: str  # "text" or "edit"
    side: int  # pixels
    steps: int

    def longer(self, times: float) -> Kind:
        """With so many times the steps."""
        return replace(self, steps=round(times * self.steps))


# About equally long, so that one is no shorter than another by its size alone.
SHORT = (Kind("text", 64, 4), Kind("text", 96, 3), Kind("text", 128, 2), Kind("edit", 64, 2))
PACKED = (Kind("text", 64, 4), Kind("text", 96, 4), Kind("text", 128, 4))


@dataclass(frozen=True)
class Arrival:
    """A request, and when it arrives."""

    seconds: float  # from the start
    kind: Kind
    is_long: bool
    seed: int


def arrivals(
    kinds: Sequence[tuple[Kind, Kind]], seconds: float, rate: float, seed: int
) -> list[Arrival]:
    """Requests of a Poisson process, the same for the same arguments.

    Args:
        kinds: short ones, each with its long one.
        seconds: how long they arrive.
        rate: requests per second.
        seed: of everything that is drawn.
    """
    draw = random.Random(seed)
    found: list[Arrival] = []
    moment = draw.expovariate(rate)
    while moment < seconds:
        is_long = draw.random() < SHARE_OF_LONG
        kind = draw.choice(kinds)[is_long]
        found.append(Arrival(moment, kind, is_long, draw.randrange(1 << 32)))
        moment += draw.expovariate(rate)
    return found


class Client:
    """A server's address."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, kind: Kind, seed: int) -> bytes:
        """The PNG file of a request; raises RuntimeError for any other answer."""
        prompt = _PROMPTS[seed % len(_PROMPTS)] if kind.task == "text" else _EDIT
        fields = {
            "prompt": prompt,
            "size": f"{kind.side}x{kind.side}",
            "num_inference_steps": kind.steps,
            "seed": seed,
            "output_format": "png",
        }
        if kind.task == "text":
            path, body = "generations", json.dumps(fields).encode()
            headers = {"Content-Type": "application/json"}
        else:
            path = "edits"
            body, headers = _form(fields, _image())
        status, answer = self.send("POST", f"/v1/images/{path}", body, headers)
        if status != 200:
            raise RuntimeError(f"{kind}: {status} {answer[:300]!r}")
        return base64.b64decode(json.loads(answer)["data"][0]["b64_json"])

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, bytes]:
        """Status and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _image() -> bytes:
    return (ROOT / "omnigen_fast/models/shapes/inputs/star.png").read_bytes()


def _form(fields: dict[str, Any], image: bytes) -> tuple[bytes, dict[str, str]]:
    """A body of multipart/form-data, and its header."""
    mark = secrets.token_hex(16)
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="star.png"\r\n'
    parts += [
        f"{head}Content-Type: image/png\r\n\r\n".encode(),
        image,
        f"\r\n--{mark}--\r\n".encode(),
    ]
    return b"".join(parts), {"Content-Type": f"multipart/form-data; boundary={mark}"}


@contextmanager
def served(options: Sequence[str], model: str, dtype: str) -> Iterator[Client]:
    """`omnigen-fast serve` in a process of its own, ready for requests."""
    command = [sys.executable, "-m", "omnigen_fast", "serve", "--model", model, "--dtype", dtype]
    command += ["--device", "cpu", "--port", "0", "--no-key", "--max-queue", "10000"]
    command += ["--max-steps", "1000", *options]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r":(\d+)/", said)
        if not found:
            raise RuntimeError(f"the server does not start: {said}")
        client = Client(int(found[1]))
        deadline = time.monotonic() + _WAIT
        while client.send("GET", "/ready")[0] != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server does not become ready")
            time.sleep(0.1)
        yield client
    finally:
        process.terminate()
        try:
            process.wait(90)
        finally:
            process.kill()


@dataclass
class Answer:
    """When a request was answered, with what."""

    arrival: Arrival
    seconds: float = 0.0  # from its arrival
    end: float = 0.0  # from the start
    picture: bytes = b""
    problem: str | None = None


def play(client: Client, schedule: Sequence[Arrival]) -> list[Answer]:
    """Sends each request when it arrives; returns the answers, in the order of arrival.

    Raises RuntimeError if one failed.
    """
    start = time.perf_counter()
    answers = [Answer(one) for one in schedule]

    def send(answer: Answer) -> None:
        try:
            answer.picture = client.ask(answer.arrival.kind, answer.arrival.seed)
        except (RuntimeError, OSError, http.client.HTTPException) as error:
            answer.problem = f"{type(error).__name__}: {error}"
        answer.end = time.perf_counter() - start
        answer.seconds = answer.end - answer.arrival.seconds

    threads = [threading.Thread(target=send, args=(one,), daemon=True) for one in answers]
    for answer, thread in zip(answers, threads):
        time.sleep(max(0.0, start + answer.arrival.seconds - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join(_WAIT)
    problems = [one.problem or "no answer" for one in answers if not one.end or one.problem]
    if problems:
        raise RuntimeError(f"{len(problems)} requests failed, the first with {problems[0]}")
    return answers


def check_same(one: Sequence[Answer], other: Sequence[Answer]) -> None:
    """Raises RuntimeError if the pictures of the same requests differ by more than rounding."""
    import numpy as np
    from PIL import Image

    for first, second in zip(one, other):
        images = [
            np.array(Image.open(io.BytesIO(answer.picture)), dtype=int)
            for answer in (first, second)
        ]
        if np.abs(images[0] - images[1]).max() > _LEVELS:
            raise RuntimeError(f"two servers answer {first.arrival} with other pictures")


def alone(client: Client, kind: Kind, repeats: int = 3) -> float:
    """Median seconds of a kind of request by itself; the server learns its pace meanwhile."""
    client.ask(kind, 0)  # what is kept of its condition is kept for all that follow
    seconds = []
    for repeat in range(repeats):
        start = time.perf_counter()
        client.ask(kind, repeat)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def lengthened(client: Client, kind: Kind) -> Kind:
    """The kind with so many steps that it lasts `LONGER` times as long."""
    once, more = (alone(client, one, 5) for one in (kind, kind.longer(_TRIED)))
    per_times = max(1e-9, (more - once) / (_TRIED - 1))  # what is not of the steps cancels out
    return kind.longer(min(3 * LONGER, max(LONGER, 1 + (LONGER - 1) * once / per_times)))


def burst(client: Client, kind: Kind) -> float:
    """Requests per second, of many of one size that arrive at once."""
    answers = play(client, [Arrival(0.0, kind, False, seed) for seed in range(_AT_ONCE)])
    return _AT_ONCE / max(one.end for one in answers)


def measure(
    seconds: float, load: float, rounds: int, seed: int, model: str, dtype: str
) -> dict[str, Any]:
    """The whole test; see the module.

    Args:
        seconds: how long requests arrive at each server, in all rounds together.
        load: share of the time that a server without packing would be busy.
        rounds: in which the servers take turns.
        seed: of the requests.
        model, dtype: that are served.
    """
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(served(options, model, dtype))
            for name, options in VARIANTS.items()
        }
        kinds = [(kind, lengthened(clients[UNPACKED], kind)) for kind in SHORT]
        both = [kind for pair in kinds for kind in pair]
        expected = {kind: alone(clients[UNPACKED], kind) for kind in both}
        for name in (OWN, PACKED_FIRST_COME, FIRST_COME):
            for kind in both:
                alone(clients[name], kind, 1)
        short, long = (statistics.fmean(map(expected.__getitem__, one)) for one in zip(*kinds))
        rate = load / ((1 - SHARE_OF_LONG) * short + SHARE_OF_LONG * long)
        answers: dict[str, list[Answer]] = {name: [] for name in VARIANTS}
        spans = dict.fromkeys(VARIANTS, 0.0)
        for turn in range(rounds):
            schedule = arrivals(kinds, seconds / rounds, rate, seed + turn)
            played = {}
            for name in _turned(list(VARIANTS), turn):
                played[name] = play(clients[name], schedule)
                spans[name] += max(one.end for one in played[name])
            for name in VARIANTS:
                check_same(played[OWN], played[name])
                answers[name] += played[name]
        bursts: dict[str, dict[str, list[float]]] = {name: {} for name in VARIANTS}
        for turn in range(rounds):
            for kind in PACKED:
                for name in _turned(list(VARIANTS), turn):
                    found = bursts[name].setdefault(str(kind.side), [])
                    found.append(round(burst(clients[name], kind), 3))
    return {
        "machine": machine(),
        "cores": os.cpu_count(),
        "model": model,
        "dtype": dtype,
        "seed": seed,
        "load": load,
        "rounds": rounds,
        "requests_per_second": round(rate, 3),
        "kinds": [[asdict(kind) for kind in pair] for pair in kinds],
        "alone_seconds": {"short": round(short, 4), "long": round(long, 4)},
        "variants": {
            name: summary(answers[name], spans[name], expected) | {"at_once": bursts[name]}
            for name in VARIANTS
        },
    }


def _turned(names: list[str], turn: int) -> list[str]:
    """Another order in each round."""
    first = turn % len(names)
    return names[first:] + names[:first]


def summary(answers: Sequence[Answer], span: float, expected: dict[Kind, float]) -> dict[str, Any]:
    """Throughput, times and fairness of some answers.

    Args:
        answers: of a server.
        span: seconds from the first arrival to the last answer.
        expected: seconds of each kind alone, from which slowdowns follow.
    """
    slowdowns = [one.seconds / expected[one.arrival.kind] for one in answers]
    times = {
        name: sorted(round(one.seconds, 4) for one in answers if one.arrival.is_long == is_long)
        for name, is_long in (("short", False), ("long", True))
    }
    return {
        "requests": len(answers),
        "per_second": round(len(answers) / span, 3),
        **{name: statistics_of(found) for name, found in times.items()},
        "fairness": round(jain(slowdowns), 3),
        "worst_slowdown": round(max(slowdowns), 2),
        "times": times,
    }


def statistics_of(times: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of sorted seconds."""
    ranks = {f"p{share}": percentile(times, share) for share in (50, 95, 99)}
    return {"mean": round(statistics.fmean(times), 4), **ranks}


def percentile(times: Sequence[float], share: int) -> float:
    """The least of some sorted values that `share` per cent do not exceed."""
    return times[max(0, -(-len(times) * share // 100) - 1)]


def jain(values: Sequence[float]) -> float:
    """Jain's index: 1 if all are equal, 1 / n if one has everything."""
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def markdown(result: dict[str, Any]) -> str:
    """Tables of a result."""
    at, short, long = result["machine"], *result["alone_seconds"].values()
    rows = result["variants"]
    own = rows[OWN]
    lines = [
        f"{at['cpu']}, {result['cores']} cores, PyTorch threads: {at['threads']}, {at['date']}; "
        f"bundled model, {result['dtype']}; {own['requests']} requests, "
        f"{result['requests_per_second']:.2f} per second, which is {result['load']:.0%} of what "
        f"the server can do without packing. Alone, a short one takes {short * 1000:.0f} ms and a "
        f"long one {long * 1000:.0f} ms. Times are in seconds, from arrival to answer:",
        "",
        "| server | short: mean | p50 | p95 | p99 | long: mean | p50 | p95 | p99 | per second "
        "| fairness | worst slowdown |",
        f"|{' --- |' * 12}",
    ]
    for name, row in rows.items():
        cells = [f"{row[size][what]:.2f}" for size in ("short", "long") for what in _SHOWN]
        cells += [f"{row['per_second']:.2f}", f"{row['fairness']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['worst_slowdown']:.1f}x |")
    for name in (FIRST_COME, PACKED_FIRST_COME):
        other = rows[name]
        ratio = other["short"]["mean"] / own["short"]["mean"]
        tail = own["long"]["p99"] / other["long"]["p99"]
        lines += [
            "",
            f"Against *{name}*, short requests take {ratio:.1f} times less on average, and the "
            f"99th percentile of long ones is {tail:.2f} times as high.",
        ]
    lines += [
        "",
        f"Requests per second, of {_AT_ONCE} that arrive at once (median of "
        f"{result['rounds']} rounds):",
        "",
        "| pixels | packed | without packing | gain |",
        "| --- | --- | --- | --- |",
    ]
    for side, packed in own["at_once"].items():
        with_, without = (
            statistics.median(packed),
            statistics.median(rows[UNPACKED]["at_once"][side]),
        )
        lines.append(f"| {side} x {side} | {with_:.2f} | {without:.2f} | {with_ / without:.2f}x |")
    return "\n".join(lines) + "\n"


_SHOWN = ("mean", "p50", "p95", "p99")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws which share of the requests is answered in what time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    from .plots import COLOURS

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, size in zip(axes, ("short", "long")):
        for colour, (name, row) in zip(COLOURS, result["variants"].items()):
            times = row["times"][size]
            shares = [i / len(times) for i in range(len(times) + 1)]
            axis.step([times[0], *times], shares, where="post", color=colour, label=name)
        axis.axvline(result["alone_seconds"][size], color="#8c8c8c", linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("seconds from arrival to answer")
        axis.set_title(f"{size} requests (dotted: alone)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{result['load']:.0%} load, {result['machine']['cpu']}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measures, and writes the result and its plot."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve_load", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="of arrivals at each server")
    parser.add_argument("--load", type=float, default=0.8, help="share of a server's time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    given = parser.parse_args()
    result = measure(given.seconds, given.load, given.rounds, given.seed, given.model, given.dtype)
    given.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    plot(result, given.plot)
    print(markdown(result))
    print(json.dumps({**result, "variants": None}))


if __name__ == "__main__":
    main()
