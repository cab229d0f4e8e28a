"""Every preset of the family, some with their options combined: what a loss path must get right."""

from __future__ import annotations

import fastpo

PRESETS: dict[str, fastpo.Objective] = {
    "ppo": fastpo.ppo(),
    "ppo_dual_clip": fastpo.ppo(ratio_max=3.0),
    "grpo": fastpo.grpo(),
    "grpo_kl": fastpo.grpo(kl_coef=0.04),
    "dapo": fastpo.dapo(),
    "dapo_entropy": fastpo.dapo(entropy_coef=0.01),
    "dapo_all": fastpo.dapo(
        ratio_max=4.0, kl_coef=0.1, kl_estimator="k3+", kl_ratio_weighted=True, entropy_coef=0.05
    ),
    "dr_grpo": fastpo.dr_grpo(max_length=64),
    "bnpo": fastpo.bnpo(),
    "gspo": fastpo.gspo(clip_low=0.05, clip_high=0.05),
    "luspo": fastpo.luspo(clip_low=0.05, clip_high=0.05),
    "gspo_token": fastpo.gspo_token(clip_low=0.05, clip_high=0.05),
    "cispo": fastpo.cispo(ratio_min=0.85, ratio_max=1.1),
    "dppo_kl": fastpo.dppo(gate="kl", clip_low=1e-4, clip_high=1e-4),
    "ipo": fastpo.ipo(clip_low=1e-4, clip_high=1e-4, old_kl_coef=0.1),
    "topr": fastpo.topr(),
    "aspo": fastpo.aspo(ratio_max_pos=1.1),
    "ce_gppo": fastpo.ce_gppo(clip_low=0.1, clip_high=0.1),
    "sapo": fastpo.sapo(),
    "gmpo": fastpo.gmpo(kl_coef=0.1, entropy_coef=0.02),
    "vespo": fastpo.vespo(),
    "gpg": fastpo.gpg(),
    "reinforce": fastpo.reinforce(kl_coef=0.1, kl_estimator="abs"),
}

# Gates that fire among few likely tokens, where p - p_old and the binary KL are not tiny.
GATES: dict[str, fastpo.Objective] = {
    "dppo_tv": fastpo.dppo(clip_low=0.03, clip_high=0.05),
    "dppo_kl": fastpo.dppo(gate="kl", clip_low=2e-3, clip_high=4e-3, ratio_max=1.1),
    "ipo": fastpo.ipo(clip_low=0.05, clip_high=0.05, old_kl_coef=0.3),
    "icepop": fastpo.icepop(clip_low=0.1, clip_high=0.2, ratio_min=0.95),
    "topr": fastpo.topr(old_kl_coef=0.2, old_kl_estimator="k3"),
    "aspo": fastpo.aspo(clip_low=0.1, ratio_max_pos=1.1),
    "ce_gppo": fastpo.ce_gppo(clip_low=0.1, clip_high=0.1, kl_coef=0.1),
}
