"""The six networks that BINAS publishes (README of its repository), and what they count."""

from __future__ import annotations

BINAS = {
    "A": (
        "[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre_se0.25', 'ir_r1_k5_s1_e4_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c80', 'ir_r1_k5_s1_e3_c80_se0.25', 'ir_r1_k5_s1_e4_c80_se0.25'], "
        "['ir_r1_k5_s1_e4_c112_se0.25', 'ir_r1_k5_s1_e4_c112_se0.25'], "
        "['ir_r1_k5_s2_e4_c192_se0.25', 'ir_r1_k5_s1_e4_c192_se0.25', 'ir_r1_k3_s1_e4_c192_se0.25', "
        "'ir_r1_k5_s1_e3_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
    "B": (
        "[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k5_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre_se0.25', 'ir_r1_k5_s1_e4_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e4_c80_se0.25', 'ir_r1_k5_s1_e4_c80_se0.25', 'ir_r1_k5_s1_e4_c80_se0.25'], "
        "['ir_r1_k3_s1_e4_c112_se0.25', 'ir_r1_k5_s1_e4_c112_se0.25', 'ir_r1_k5_s1_e4_c112_se0.25'], "
        "['ir_r1_k3_s2_e4_c192_se0.25', 'ir_r1_k5_s1_e4_c192_se0.25', 'ir_r1_k3_s1_e4_c192_se0.25', "
        "'ir_r1_k5_s1_e4_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
    "C": (
        "[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k5_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre_se0.25', 'ir_r1_k5_s1_e4_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e4_c80_se0.25', 'ir_r1_k5_s1_e4_c80_se0.25', 'ir_r1_k5_s1_e4_c80_se0.25'], "
        "['ir_r1_k3_s1_e4_c112_se0.25', 'ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k5_s1_e4_c112_se0.25'], "
        "['ir_r1_k3_s2_e6_c192_se0.25', 'ir_r1_k5_s1_e6_c192_se0.25', 'ir_r1_k3_s1_e6_c192_se0.25', "
        "'ir_r1_k5_s1_e4_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
    "D": (
        "[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k5_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre_se0.25', 'ir_r1_k5_s1_e4_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c80', 'ir_r1_k5_s1_e6_c80_se0.25', 'ir_r1_k3_s1_e4_c80_se0.25', "
        "'ir_r1_k5_s1_e3_c80_se0.25'], "
        "['ir_r1_k3_s1_e6_c112_se0.25', 'ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k5_s1_e4_c112_se0.25', "
        "'ir_r1_k3_s1_e4_c112_se0.25'], "
        "['ir_r1_k3_s2_e6_c192_se0.25', 'ir_r1_k5_s1_e4_c192_se0.25', 'ir_r1_k5_s1_e6_c192_se0.25', "
        "'ir_r1_k5_s1_e4_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
    "E": (
        "[['ds_r1_k3_s1_e1_c16_nre'], "
        "['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre', 'ir_r1_k3_s1_e4_c40_nre_se0.25', 'ir_r1_k3_s1_e4_c40_nre_se0.25', "
        "'ir_r1_k5_s1_e6_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c80', 'ir_r1_k5_s1_e3_c80_se0.25', 'ir_r1_k3_s1_e4_c80_se0.25', "
        "'ir_r1_k5_s1_e6_c80_se0.25'], "
        "['ir_r1_k3_s1_e4_c112_se0.25', 'ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k3_s1_e6_c112_se0.25', "
        "'ir_r1_k5_s1_e4_c112_se0.25'], "
        "['ir_r1_k3_s2_e6_c192_se0.25', 'ir_r1_k3_s1_e4_c192_se0.25', 'ir_r1_k5_s1_e6_c192_se0.25', "
        "'ir_r1_k5_s1_e6_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
    "F": (
        "[['ds_r1_k3_s1_e1_c16_nre'], "
        "['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre', 'ir_r1_k3_s1_e3_c24_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c40_nre', 'ir_r1_k5_s1_e4_c40_nre', 'ir_r1_k3_s1_e4_c40_nre_se0.25', "
        "'ir_r1_k5_s1_e6_c40_nre_se0.25'], "
        "['ir_r1_k5_s2_e3_c80', 'ir_r1_k3_s1_e6_c80_se0.25', 'ir_r1_k5_s1_e6_c80_se0.25', "
        "'ir_r1_k5_s1_e6_c80_se0.25'], "
        "['ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k3_s1_e6_c112_se0.25', "
        "'ir_r1_k3_s1_e6_c112_se0.25'], "
        "['ir_r1_k3_s2_e6_c192_se0.25', 'ir_r1_k3_s1_e4_c192_se0.25', 'ir_r1_k5_s1_e6_c192_se0.25', "
        "'ir_r1_k5_s1_e6_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
    ),
}
COUNTS = {"A": (5.17, 204), "C": (7.06, 271), "F": (8.17, 385)}  # millions of parameters, of MACs
