"""What is known about the methods in closed form: stability, rates, variances, fixed points, bounds.

Pure functions of numbers, in the papers' symbols, for one coordinate of the quadratic f(x) = h x^2 / 2 unless they say
otherwise. They start no MPI and know no method's code: the tests of the methods and the warnings before a run use them.

    eta, h, eh    learning rate, curvature, their product         p, tau    workers, local steps between exchanges
    alpha, beta   the workers' and the center's moving rate       delta     momentum
    sigma         standard deviation of a gradient's noise        lam       pull to a leader

Each docstring has the formula and says where it comes from: from the paper; from memory of the paper; or derived for
this project, in which case it has been compared with eigenvalues, enumeration or simulation.
"""

from __future__ import annotations

from mpitrain.theory.delayed import (
    agn_largest_eh,
    agn_q,
    agn_safe_period,
    delayed_matrix,
    delayed_radius,
    downpour_bound,
    downpour_is_stable,
    downpour_largest_eh,
    downpour_largest_period,
    downpour_q,
    dynsgd_q,
    early_exchange_step,
    elastic_equilibrium,
    geometric_staleness_mean,
    implicit_momentum,
    implicit_momentum_matrix,
    mdownpour_largest_eh,
    mdownpour_matrix,
)
from mpitrain.theory.elastic import (
    eamsgd_matrix,
    easgd_disagreement_factor,
    easgd_fixed_point,
    easgd_full_matrix,
    easgd_is_stable,
    easgd_matrix,
    easgd_mean,
    elastic_order_matrix,
    gauss_seidel_is_stable,
    optimal_moving_rate,
)
from mpitrain.theory.gossip import (
    exponential_graph_error,
    pull_contraction,
    pull_mean_variance,
    push_contraction,
    push_mean_variance,
)
from mpitrain.theory.leader import (
    EASGD_TRAP,
    LEADER_TRAP,
    double_well_gradient,
    elastic_double_well_hessian,
    follower_factor,
    follower_is_stable,
    trapped_easgd,
    trapped_follower,
)
from mpitrain.theory.linear import (
    spectral_radius,
    stationary_covariance,
)
from mpitrain.theory.noise import (
    allreduce_variance,
    averaged_center_variance,
    critical_momentum,
    easgd_center_variance,
    easgd_center_variance_limit,
    easgd_error_bound,
    easgd_is_mean_square_stable,
    easgd_second_moment,
    easgd_worker_variance,
    msgd_matrix,
    msgd_variance,
    spread_sgd_bound,
    spread_sgd_factor,
    spread_sgd_optimum,
)
from mpitrain.theory.regions import (
    agn_warning,
    diloco_warning,
    downpour_warning,
    elastic_warning,
    mdownpour_warning,
    slowmo_warning,
)
from mpitrain.theory.round_robin import (
    round_robin_admm_matrix,
    round_robin_easgd_bound,
    round_robin_easgd_matrix,
    round_robin_easgd_step,
)
from mpitrain.theory.rounds import (
    diloco_is_stable,
    diloco_matrix,
    diloco_radius,
    local_sgd_fixed_point,
    parle_inner_fixed_point,
    parle_inner_iterate,
    slowmo_is_stable,
    slowmo_matrix,
)
from mpitrain.theory.safeguard import (
    safeguard_detection_step,
)

__all__ = [
    "EASGD_TRAP",
    "LEADER_TRAP",
    "agn_largest_eh",
    "agn_q",
    "agn_safe_period",
    "agn_warning",
    "allreduce_variance",
    "averaged_center_variance",
    "critical_momentum",
    "delayed_matrix",
    "delayed_radius",
    "diloco_is_stable",
    "diloco_matrix",
    "diloco_radius",
    "diloco_warning",
    "double_well_gradient",
    "downpour_bound",
    "downpour_is_stable",
    "downpour_largest_eh",
    "downpour_largest_period",
    "downpour_q",
    "downpour_warning",
    "dynsgd_q",
    "eamsgd_matrix",
    "early_exchange_step",
    "easgd_center_variance",
    "easgd_center_variance_limit",
    "easgd_disagreement_factor",
    "easgd_error_bound",
    "easgd_fixed_point",
    "easgd_full_matrix",
    "easgd_is_mean_square_stable",
    "easgd_is_stable",
    "easgd_matrix",
    "easgd_mean",
    "easgd_second_moment",
    "easgd_worker_variance",
    "elastic_double_well_hessian",
    "elastic_equilibrium",
    "elastic_order_matrix",
    "elastic_warning",
    "exponential_graph_error",
    "follower_factor",
    "follower_is_stable",
    "gauss_seidel_is_stable",
    "geometric_staleness_mean",
    "implicit_momentum",
    "implicit_momentum_matrix",
    "local_sgd_fixed_point",
    "mdownpour_largest_eh",
    "mdownpour_matrix",
    "mdownpour_warning",
    "msgd_matrix",
    "msgd_variance",
    "optimal_moving_rate",
    "parle_inner_fixed_point",
    "parle_inner_iterate",
    "pull_contraction",
    "pull_mean_variance",
    "push_contraction",
    "push_mean_variance",
    "round_robin_admm_matrix",
    "round_robin_easgd_bound",
    "round_robin_easgd_matrix",
    "round_robin_easgd_step",
    "safeguard_detection_step",
    "slowmo_is_stable",
    "slowmo_matrix",
    "slowmo_warning",
    "spectral_radius",
    "spread_sgd_bound",
    "spread_sgd_factor",
    "spread_sgd_optimum",
    "stationary_covariance",
    "trapped_easgd",
    "trapped_follower",
]
