"""docs/commands.md: every published command and option is there, and everything it is mapped to exists."""

import json
import re
import shlex

import pytest
import yaml

from clones import ROOT
from hobs_rspar.config import CLAIMS, EXPERIMENTS

NOT_YET = "not available yet"
TEXT = (ROOT / "docs/commands.md").read_text()
PARAMS = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]

# What the published documents name: commands and options of the command line, keys of the YAML format, methods.
PUBLISHED = """
docker build, docker run, conda create, conda activate, pip install,
experiments/main.py, main.py --config, main.py --gpu, main.py --seed, main.py --method,
experiments/ablation.py, ablation.py --config, --ablation all, --ablation module, --ablation hessian,
--ablation no_hessian, --ablation no_rl,
experiments/system_eval.py, system_eval.py --config, system_eval.py --checkpoint,
reproduce.sh, reproduce.sh --dataset, reproduce.sh --model, reproduce.sh --seed, train.sh,
configs/resnet50.yaml, configs/mobilenetv2.yaml, configs/efficientnet_b0.yaml,
depgraph, jtp, bilevel, structalign, udfc, unpruned, dep_graph_prune, autocompress_prune, hrank_prune, taylor_prune,
adaprune_prune, gnn_prune, hobs-rspar,
model.name, model.pretrained, model.num_classes, dataset.name, dataset.data_dir, dataset.image_size, pruning.method,
pruning.target_flops_reduction, pruning.hobs.use_kfac, pruning.hobs.damping, pruning.hobs.num_batches_sensitivity,
pruning.rspar.num_episodes, pruning.rspar.hidden_dim, pruning.rspar.learning_rate, experiment.name,
experiment.save_dir, experiment.random_seeds,
run_all.sh, hadmc_experiments_complete.py, generate_figures.py, generate_scripts.py, pruning_train.py, --set, --arch,
--save_dir, --evaluate, --pretrained, --N, --M, --conv-type, --conv-bn-type, --decay-start, --decay-end,
--prune-schedule, --prune-rate, --prune-criterion, --batch-size, --lr, --weight-decay, --no-bn-decay, --nesterov,
--warmup-length, --workers
"""


def rows() -> list[tuple[str, str]]:
    """(published, here) of every row of every table."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines()
             if line.startswith("| ") and not line.startswith("| published")]
    return [(row[0], row[1]) for row in cells]


def has_key(dotted: str) -> bool:
    place = PARAMS
    for part in dotted.split("."):
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
    return True


@pytest.mark.parametrize("name", [name.strip() for name in PUBLISHED.replace("\n", " ").split(",")])
def test_published_name_is_mapped(name):
    assert any(name in published for published, _ in rows())


@pytest.mark.parametrize("here", sorted({here for _, here in rows()}))
def test_what_it_is_mapped_to_exists(here):
    if here == "none":
        return
    command = re.fullmatch(r"`([^`]+)`", here)
    assert command, f"the second column holds one command, key or method in backticks: {here}"
    check(command[1])


def test_every_key_and_command_in_the_notes_exists():
    """Keys and commands that stand in notes and prose."""
    for text in re.findall(r"`([^`\n]+)`", TEXT):
        if re.fullmatch(rf"({'|'.join(PARAMS)})\.[a-z_.]+", text) and not text.endswith((".yaml", ".py")):
            published = any(f"`{text}`" in row[0] for row in rows())
            assert published or has_key(text), text
        elif text.startswith(("make ", "dvc ", "python pipeline/")):
            check(text)


def check(text: str) -> None:
    """Fails unless a command, params key or method exists here."""
    if text.startswith("make "):
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert text.split()[1] in targets
        study = re.search(r"STUDY=(\w+)", text)
        assert not study or (ROOT / f"configs/{study[1]}.yaml").is_file()
    elif text.startswith("dvc "):
        check_dvc(shlex.split(text))
    elif text.startswith("python "):
        script, *options = text.split()[1:]
        source = (ROOT / script).read_text()
        assert all(f'"{option}"' in source for option in options if option.startswith("--"))
    elif not text.startswith(("docker ", "source ")) and text != NOT_YET:
        assert has_key(text) or (ROOT / f"src/hobs_rspar/methods/{text}.py").is_file(), text


def check_dvc(words: list[str]) -> None:
    assert words[1] in ("repro", "exp", "queue")
    for stage in words[2:] if words[1] == "repro" else []:
        name, _, cell = stage.partition("@")
        assert name == "-s" or name in STAGES, stage
        if name in ("claim", "experiment"):
            assert cell in (CLAIMS if name == "claim" else EXPERIMENTS)
        elif cell:
            method, _, seed = cell.rpartition("-")
            assert method in PARAMS["study"]["methods"] and int(seed) in PARAMS["study"]["seeds"]


def test_system_evaluation_of_a_checkpoint(micro):
    """``system_eval.py --checkpoint``: one network by itself."""
    network = next((micro.path / "artifacts/micro/cells").glob("*/recovered.safetensors")).relative_to(micro.path)
    out = micro.run(f"python pipeline/benchmark.py --checkpoint {network} --seconds 0.2 --json /dev/stdout")
    assert "ms" in out and "Traceback" not in out
    out = micro.run("python pipeline/benchmark.py --checkpoint model.pth", ok=False)
    assert "error: " in out and "model.pth" in out and "Traceback" not in out


def test_figures_alone(micro):
    """``generate_figures.py``: the report from the cells, without anything else."""
    out = micro.run("dvc repro --force -s report")
    assert "report micro: " in out and "finetune" not in out
    assert json.loads(micro.read("reports/micro/metrics.json"))["l1"]["macs_ratio"] == pytest.approx(0.6, rel=0.01)
    micro.run("git checkout --quiet -- .")


def test_preview_of_the_default_study(micro):
    """In seconds, without training and without results."""
    micro.run("make study STUDY=default")
    out = micro.run("make preview")
    micro.run("git checkout --quiet -- . && git clean --quiet -d --force reports")
    for part in ("study default", "groups", "M MACs dense", "uniform widths keep 0.2", "stages", "from nothing: about"):
        assert part in out
