"""Taylor, one shot: squared gradient of the loss with respect to each gate, one threshold for all groups.

Paper: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019. Faithful: gates after batch norm
and activation, the squared gradient of a minibatch's loss averaged over minibatches, global ranking without
normalisation per layer. Simplified: all channels are removed at once instead of 100 neurons every 30 minibatches with
training in between, hence the name. Calibration images are used, with their true labels.
"""

from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.config import Positive, Section
from hobs_rspar.curvature.gates import taylor_score
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """Options.

    Attributes:
        batch_size: images a minibatch whose mean gradient is squared.
    """

    batch_size: Positive = 12


def plan(context: Context, options: Options) -> PruningPlan:
    scores = context.per_group(taylor_score(context.sensitivity["true_rows"], options.batch_size))
    widths = threshold_widths(context.space, scores)
    return context.keep_best(scores, widths, "squared gate gradient, global threshold")
