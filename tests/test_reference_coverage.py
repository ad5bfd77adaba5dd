"""Every group of three reference files is named here with the test that reproduces it, and that test exists."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TEXT = {"kind", "tol", "rtol", "conv", "note", "_readme", "law"}
COVERED: dict[str, dict[str, str]] = {
    "order_chaos": {
        "r_values/*": "test_order_chaos::test_moments_and_r",
        "closed_forms/*": "test_order_chaos::test_closed_forms",
        "knob_relu_shift_beta0.1/*": "test_order_chaos::test_shift_knob",
        "knob_sin_freq_beta0.1/*": "test_order_chaos::test_frequency_knob",
        "fc/order_*": "test_order_chaos::test_order",
        "fc/chaos_*": "test_order_chaos::test_chaos",
        "fc/edge_*": "test_order_chaos::test_edge",
        "fc/vartheta_table_*": "test_order_chaos::test_vartheta_table",
        "normalisation_mc/*_vs_*": "test_reference_norms::test_distances_from_the_limits",
        "normalisation_mc/bn_*": "test_reference_norms::test_constant_mode_behind_batch_norm",
        "ntk_param_equivalence/*": "test_ntk_chaos::test_sgd_follows_the_ntk_parametrization",
        "dcnn/border2d_relu_std_*": "test_order_chaos_networks::test_borders",
        "dcnn/border2d_relu_uniform_*": "test_reference_decoders::test_output_variances",
        "dcnn/parents_1d": "test_graph_parametrize::test_parents_of_the_reference",
        "dcnn/checker1d_*": "test_order_chaos_networks::test_checkerboards",
        "dcnn/spectrum2d_*": "test_order_chaos_networks::test_spectrum_2d",
        "dcnn/spectrum1d_*": "test_order_chaos_networks::test_spectrum_1d",
        "mc_dcnn/relu_*": "test_reference_decoders::test_finite_width",
        "mc_dcnn/fx_rewrite": "test_reference_decoders::test_output_variances",
        "layer_lr/?D_*": "test_order_chaos_networks::test_layer_dependent_learning_rate",
        "layer_lr/k3s2p1op1_*": "test_order_chaos_networks::test_interior_of_an_uneven_stride",
    },
    "isometry": {
        "S4_meanfield/critical_line_*": "test_meanfield::test_critical_line_of_tanh",
        "S4_meanfield/critical_from_sb2_*": "test_meanfield::test_critical_point_of_a_bias",
        "S4_meanfield/off_critical_*": "test_meanfield::test_off_the_critical_line",
        "S4_meanfield/relu": "test_meanfield::test_relu_is_critical_at_two_for_every_q",
        "S4_schedule_q_1_over_L/*": "test_meanfield::test_one_over_depth",
        "S4_conv/delta_circ_*": "test_isometry_convolutions::test_delta_keeps_the_norm_on_a_circle",
        "S4_conv/*_sv_minmax": "test_isometry_convolutions::test_general_reference",
        "S4_conv/delta_[zgd]*": "test_isometry_convolutions::test_norms_of_the_reference",
        "S4_conv/kt_k3_*_norm": "test_isometry_convolutions::test_norms_of_the_reference",
        "S4_conv/delta_[14s]*": "test_isometry_convolutions::test_variance_scaling",
        "S4_conv/*_v_marginal": "test_isometry_convolutions::test_taps_of_the_general_form_are_binomial",
        "S4_conv/zero_pad_*": "test_meanfield::test_zero_padding_loses_the_constant_mode",
        "S4_conv/gauss_k3_c32_sv": "test_reference_modes::test_singular_values_of_gaussian_taps",
        "S4_conv/fourier_*": "test_reference_modes::test_decay_of_fourier_modes",
        "S4_deep_propagation_c32/*": "test_reference_modes::test_ratios_over_deep_chains",
        "S4_jacobian/*": "test_reference_jacobian::test_every_number",
        "S3_aspect_rule/*": "test_fluctuations::test_rule_of_unequal_widths",
        "S3_theory/*": "test_fluctuations::test_every_number_of_the_paper",
        "S3_mc_n32_N800/*": "test_fluctuation_draws::test_monte_carlo_of_the_paper",
        "S3_mc_dntk_n16_N1000/*": "test_fluctuation_draws::test_monte_carlo_of_the_dntk",
        "S3_ddntk_n16/*": "test_fluctuation_reference::test_dntk_and_ddntk",
        "S3_train_synthetic_n20/*": "test_reference_training::test_losses_and_accuracies",
    },
    "resnet_scaling": {
        "S5_depth/*": "test_reference_depth::test_statistics",
        "S5_hist_d100/*": "test_residual_depth::test_logarithm_of_growth",
        "S5_heat_L1000_fbm/*": "test_reference_depth::test_map_of_gradients",
        "S5_displacement_exponent/*": "test_depth_correlated::test_displacement_exponents",
        "S5_weight_autocov/rbf_*": "test_depth_correlated::test_rbf_autocovariance",
        "S5_weight_autocov/fgn": "test_depth_correlated::test_fractional_noise_autocovariance",
    },
}
"""Names of groups of one and two levels; the text of S3_A_gauss_1_over_n_extrapolation is read by its own test."""


def groups(tree: dict[str, Any]) -> Iterator[str]:
    for name, inner in tree.items():
        rows = inner.get("data", inner) if isinstance(inner, dict) else {}
        yield from (f"{name}/{row}" for row in rows if row not in TEXT)


def exists(where: str) -> bool:
    file, _, name = where.partition("::")
    tree = ast.parse((HERE / f"{file}.py").read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


@pytest.mark.parametrize("file", COVERED)
def test_every_group_has_a_test(file: str) -> None:
    found = list(groups(json.loads((HERE / "reference" / f"{file}.json").read_text(encoding="utf-8"))))
    for name in found:
        assert sum(fnmatchcase(name, pattern) for pattern in COVERED[file]) == 1, name
    for pattern, where in COVERED[file].items():
        assert any(fnmatchcase(name, pattern) for name in found), f"{pattern} names nothing"
        assert exists(where), where
