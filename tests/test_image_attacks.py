"""No image file takes more than seconds, or more than a gigabyte."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import image_attacks
import pytest

pytestmark = pytest.mark.slow

SECONDS = 5  # of processors, both processes together: others may be busy here
BYTES = 1_000_000_000
READER = """
    import resource, sys
    from omnigen_fast import RequestError
    from omnigen_fast.images import read_image, to_rgb

    def peak(who):
        return 1024 * resource.getrusage(who).ru_maxrss

    to_rgb(b"P6 1 1 255 abc")
    ours, theirs = peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)
    def spent():
        both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(one.ru_utime + one.ru_stime for one in both)

    start = spent()
    try:
        read_image(sys.argv[1], 1024, 3072, "image")
        found = "read"
    except RequestError as error:
        found = f"refused {error}"
    ours, theirs = peak(resource.RUSAGE_SELF) - ours, peak(resource.RUSAGE_CHILDREN) - theirs
    print(spent() - start, ours, theirs, found)
"""


@pytest.mark.parametrize(
    ("make", "verdict"),
    [
        pytest.param(make, verdict, id=make.__name__)
        for verdict, makers in {
            "read": image_attacks.READ,
            "refused": image_attacks.REFUSED,
            "": image_attacks.EITHER,
        }.items()
        for make in makers
    ],
)
def test_an_attack_costs_no_more_than_its_pixels(make, verdict, tmp_path: Path):
    path = tmp_path / "image"
    path.write_bytes(make())
    assert path.stat().st_size < 64 << 20
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seconds, ours, theirs, found = done.stdout.split(" ", 3)
    print(make.__name__, done.stdout)
    assert found.startswith(verdict), found
    assert len(found.strip()) <= 310
    assert float(seconds) < SECONDS
    assert int(ours) < BYTES
    assert int(theirs) < 1.2 * BYTES  # with the file itself
