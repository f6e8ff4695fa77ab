"""What ``make preview`` takes a method's share of the time to be, for every method of every study."""

import sys

import pytest
from clones import ROOT

from hobs_rspar import config

sys.path.append(str(ROOT / "tasks"))  # as Python does for the script's own folder

import preview  # noqa: E402
import study as studies  # noqa: E402


@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_method_has_an_estimate(study, tmp_path):
    (tmp_path / "params.yaml").write_text(studies.composed(study))
    params = config.load(tmp_path / "params.yaml")
    for method in params.study.methods:
        seconds = preview.allocation_seconds(params, f"{method}-7", training=100.0, infer=1000.0)
        assert seconds >= 0


def test_estimates_of_searching_and_of_training():
    params = config.load(ROOT / "configs/default.yaml")
    blocks, seconds = params.methods, {}
    for name in ("hobs_rspar", "jtp", "structalign", "l1"):
        seconds[name] = preview.allocation_seconds(params, f"{name}-7", training=100.0, infer=1000.0)
    search = blocks["hobs_rspar"]
    plans = search["first"] + search["rounds"] * search["measured"]
    assert seconds == {"hobs_rspar": plans * search["images"] / 1000, "jtp": blocks["jtp"]["images"] / 100,
                       "structalign": 2 * blocks["structalign"]["images"] / 100, "l1": 0}
