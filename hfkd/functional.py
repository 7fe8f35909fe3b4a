"""The loss functions of all methods, pure and without state."""

from hfkd.distillers.aekt import aekt_loss
from hfkd.distillers.akd import gap_alpha
from hfkd.distillers.at import attention_transfer_loss
from hfkd.distillers.attention_maps import attention_relation_loss, attention_score_loss
from hfkd.distillers.crd import crd_loss
from hfkd.distillers.dist import dist_loss
from hfkd.distillers.dkd import dkd_loss, nckd_loss, tckd_loss
from hfkd.distillers.fitnet import hint_loss
from hfkd.distillers.hidden_states import hidden_state_loss
from hfkd.distillers.ic_kd import nicd_loss, picd_loss
from hfkd.distillers.kd import kd_loss
from hfkd.distillers.kd_aif import influence_weights
from hfkd.distillers.label_smoothing import label_smoothing_loss
from hfkd.distillers.nkd import nkd_loss
from hfkd.distillers.pkt import pkt_loss
from hfkd.distillers.reviewkd import hierarchical_context_loss
from hfkd.distillers.rkd import rkd_loss
from hfkd.distillers.small_loss import small_loss_weights
from hfkd.distillers.sp import sp_loss
from hfkd.distillers.standardized_logits import standardize_logits
from hfkd.distillers.tf_kd import virtual_kd_loss
from hfkd.distillers.ttm import ttm_loss, wttm_loss
from hfkd.distillers.vid import vid_loss
from hfkd.memory import aggregate_context


__all__ = [
    "aekt_loss",
    "aggregate_context",
    "attention_relation_loss",
    "attention_score_loss",
    "attention_transfer_loss",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "gap_alpha",
    "hidden_state_loss",
    "hierarchical_context_loss",
    "hint_loss",
    "influence_weights",
    "kd_loss",
    "label_smoothing_loss",
    "nckd_loss",
    "nicd_loss",
    "nkd_loss",
    "picd_loss",
    "pkt_loss",
    "rkd_loss",
    "small_loss_weights",
    "sp_loss",
    "standardize_logits",
    "tckd_loss",
    "ttm_loss",
    "vid_loss",
    "virtual_kd_loss",
    "wttm_loss",
]
