"""The published plotting functions: figures, files, refusals; and where a figure puts points of equal cost."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hobs_rspar.errors import UserError
from hobs_rspar.evidence import plots
from hobs_rspar.evidence.outcome_figures import apart, clusters


def test_published_plots_return_figures_and_save(tmp_path):
    history = [{"epoch": e, "train_loss": 1 / e, "validation_top1": 80 + e} for e in (1, 2, 3)]
    made = [
        plots.plot_training_curves(history, tmp_path / "a" / "curves.svg"),
        plots.plot_training_curves({"train_loss": [1.0, 0.5], "val_acc": [80.0, 90.0]}, tmp_path / "curves.png"),
        plots.plot_pruning_comparison(["l1", "mine"], [91.0, 92.0], [2.0, 3.0], tmp_path / "comparison.pdf"),
        plots.plot_sensitivity_heatmap({"conv1": [1.0, 2.0], "fc": [3.0]}, ["conv1", "fc"], tmp_path / "heat.png"),
        plots.plot_lambda_evolution([0.01, 0.02], [0.9, 0.91], tmp_path / "lambda.png"),
    ]
    assert all(isinstance(figure, Figure) for figure in made)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 5


@pytest.mark.parametrize(("call", "message"), [
    (lambda: plots.plot_training_curves({"speed": [1]}), "no series to plot"),
    (lambda: plots.plot_training_curves([]), "no series to plot"),
    (lambda: plots.plot_pruning_comparison(["a"], [1.0, 2.0], [1.0]), "1, 2 and 1 entries"),
    (lambda: plots.plot_sensitivity_heatmap({"a": [1]}, ["b"]), "no layer 'b'"),
    (lambda: plots.plot_sensitivity_heatmap([[1]], ["a", "b"]), "1 rows and layer_names 2"),
    (lambda: plots.plot_lambda_evolution([1], []), "1 entries and acc_history 0"),
])
def test_published_plots_refuse_clearly(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_points_at_equal_cost_are_set_apart_by_little():
    costs = {"a": 0.26, "b": 0.26, "c": 0.2601, "d": 1.0}
    assert clusters(costs, 0.05) == [["a", "b", "c"], ["d"]]
    places = list(apart(costs, ["a", "b", "c"]).values())
    assert min(np.diff(places)) > 1e-4 and max(abs(np.array(places) - 0.26)) < 1e-3
    assert apart(costs, ["d"]) == {"d": 1.0}
