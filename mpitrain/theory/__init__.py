"""Closed-form results about the methods: stability, rates, variances, fixed points and bounds.

Pure functions of numbers, in the papers' symbols. Unless stated otherwise they are for one coordinate of the quadratic
f(x) = h x^2 / 2. They import neither MPI nor the methods; the tests of the methods and the warnings before a run use
them.

    eta, h, eh    learning rate, curvature, their product         p, tau    workers, local steps between exchanges
    alpha, beta   moving rates of the workers and the center      delta     momentum
    sigma         standard deviation of a gradient's noise        lam       pull towards a leader

Each docstring gives the formula and its origin: the paper; the paper as remembered ("from memory"); or a derivation for
this project, which has been checked against eigenvalues, enumeration or simulation. `__all__` lists the functions by
module.
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
    # Parameter servers: delay and staleness.
    "agn_largest_eh",
    "agn_q",
    "agn_safe_period",
    "delayed_matrix",
    "delayed_radius",
    "downpour_bound",
    "downpour_is_stable",
    "downpour_largest_eh",
    "downpour_largest_period",
    "downpour_q",
    "dynsgd_q",
    "early_exchange_step",
    "elastic_equilibrium",
    "geometric_staleness_mean",
    "implicit_momentum",
    "implicit_momentum_matrix",
    "mdownpour_largest_eh",
    "mdownpour_matrix",
    # The EASGD family.
    "eamsgd_matrix",
    "easgd_disagreement_factor",
    "easgd_fixed_point",
    "easgd_full_matrix",
    "easgd_is_stable",
    "easgd_matrix",
    "easgd_mean",
    "elastic_order_matrix",
    "gauss_seidel_is_stable",
    "optimal_moving_rate",
    # Gossip.
    "exponential_graph_error",
    "pull_contraction",
    "pull_mean_variance",
    "push_contraction",
    "push_mean_variance",
    # Leaders, and the double well.
    "EASGD_TRAP",
    "LEADER_TRAP",
    "double_well_gradient",
    "elastic_double_well_hessian",
    "follower_factor",
    "follower_is_stable",
    "trapped_easgd",
    "trapped_follower",
    # Linear recursions.
    "spectral_radius",
    "stationary_covariance",
    # Noise.
    "allreduce_variance",
    "averaged_center_variance",
    "critical_momentum",
    "easgd_center_variance",
    "easgd_center_variance_limit",
    "easgd_error_bound",
    "easgd_is_mean_square_stable",
    "easgd_second_moment",
    "easgd_worker_variance",
    "msgd_matrix",
    "msgd_variance",
    "spread_sgd_bound",
    "spread_sgd_factor",
    "spread_sgd_optimum",
    # Warnings about settings outside the known stable region.
    "agn_warning",
    "diloco_warning",
    "downpour_warning",
    "elastic_warning",
    "mdownpour_warning",
    "slowmo_warning",
    # One worker at a time.
    "round_robin_admm_matrix",
    "round_robin_easgd_bound",
    "round_robin_easgd_matrix",
    "round_robin_easgd_step",
    # Rounds of local steps.
    "diloco_is_stable",
    "diloco_matrix",
    "diloco_radius",
    "local_sgd_fixed_point",
    "parle_inner_fixed_point",
    "parle_inner_iterate",
    "slowmo_is_stable",
    "slowmo_matrix",
    # SafeguardSGD.
    "safeguard_detection_step",
]
