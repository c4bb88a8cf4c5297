"""TIPS: anytime networks trained along the path that a Markov chain over their subnetworks finds important."""

from effnb.anytime.tips.graph import SuperGraph, layered_graph, prune_to_terminals, sample_masks, sample_subgraph
from effnb.anytime.tips.sampling import (
    AnchoredSampler,
    JointSampler,
    SandwichSampler,
    TIPSSampler,
    UniformSampler,
    candidate_subnetworks,
    mean_scores,
    shares,
)
from effnb.anytime.tips.scores import (
    TopologicalScores,
    anchor_path,
    hyper_adjacency,
    most_important_path,
    path_score,
    stationary_distribution,
    topological_scores,
    transition_matrix,
    visit_probabilities,
)
from effnb.anytime.tips.supernet import DagConvNet, DagMLP
from effnb.anytime.tips.training import AnytimeTrainer, anytime_accuracy

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
    "hyper_adjacency",
    "layered_graph",
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
