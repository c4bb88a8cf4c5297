"""Anytime networks: supernets whose subnetworks share weights, and the paths that matter for training them."""

from effnb.anytime.budget import candidate_subnetworks, expected_share, fill_budget, matched_keep, shares
from effnb.anytime.convnet import DagConvNet
from effnb.anytime.graph import SuperGraph, prune_to_terminals, sample_masks, sample_subgraph
from effnb.anytime.layered import layered_graph
from effnb.anytime.paths import anchor_path
from effnb.anytime.supernet import DagMLP
from effnb.anytime.tips import (
    TopologicalScores,
    hyper_adjacency,
    most_important_path,
    path_score,
    stationary_distribution,
    topological_scores,
    transition_matrix,
    visit_probabilities,
)
from effnb.anytime.training import (
    AnchoredSampler,
    AnytimeTrainer,
    JointSampler,
    SandwichSampler,
    TIPSSampler,
    UniformSampler,
    anytime_accuracy,
    mean_scores,
)

__all__ = [
    "AnchoredSampler",
    "AnytimeTrainer",
    "DagConvNet",
    "DagMLP",
    "JointSampler",
    "SandwichSampler",
    "SuperGraph",
    "TIPSSampler",
    "TopologicalScores",
    "UniformSampler",
    "anchor_path",
    "anytime_accuracy",
    "candidate_subnetworks",
    "expected_share",
    "fill_budget",
    "hyper_adjacency",
    "layered_graph",
    "matched_keep",
    "mean_scores",
    "most_important_path",
    "path_score",
    "prune_to_terminals",
    "sample_masks",
    "sample_subgraph",
    "shares",
    "stationary_distribution",
    "topological_scores",
    "transition_matrix",
    "visit_probabilities",
]
