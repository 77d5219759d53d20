"""A cluster on paper: rates and bandwidths, and the seconds that a collective takes with them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes, one network adapter each. The defaults are round numbers for NVIDIA's H100, not measurements.

    Args:
        training_flops: FLOPs per second of a forward and backward pass (float32, 60 % of the peak without TF32).
        product_flops: FLOPs per second of the matrix products of statistics and application.
        inversion_flops: FLOPs per second of batched Cholesky inverses.
        node_size: GPUs per node.
        node_bandwidth: Bytes per second that a GPU receives within its node (NVLink).
        node_latency_s: Seconds until a message within a node arrives.
        network_bandwidth: Bytes per second that a GPU receives from another node (400 Gb/s InfiniBand).
        network_latency_s: Seconds until a message from another node arrives.
    """

    training_flops: float = 40e12
    product_flops: float = 40e12
    inversion_flops: float = 2.5e12
    node_size: int = 8
    node_bandwidth: float = 300e9
    node_latency_s: float = 3e-6
    network_bandwidth: float = 50e9
    network_latency_s: float = 6e-6

    def bandwidth(self, num_processes: int) -> float:
        """Return the bytes per second of a ring's slowest link."""
        return self.node_bandwidth if num_processes <= self.node_size else self.network_bandwidth

    def latency_s(self, num_processes: int) -> float:
        """Return the seconds of a ring's slowest hop."""
        return self.node_latency_s if num_processes <= self.node_size else self.network_latency_s

    def gather_s(self, num_bytes: int, num_processes: int) -> float:
        """Return the seconds of a ring all-gather with this number of bytes per process: N − 1 hops of one message."""
        if num_bytes == 0:
            return 0.0
        hop = self.latency_s(num_processes) + num_bytes / self.bandwidth(num_processes)
        return (num_processes - 1) * hop

    def sum_s(self, num_bytes: int, num_processes: int) -> float:
        """Return the seconds of an all-reduce, around a ring or up and down a tree, whichever is faster.

        Ring: 2 (N − 1) hops of 1/N of the bytes. Tree: 2 log₂ N latencies, and the bytes twice.
        """
        if num_bytes == 0 or num_processes == 1:
            return 0.0
        latency, bandwidth = self.latency_s(num_processes), self.bandwidth(num_processes)
        ring = 2 * (num_processes - 1) * (latency + num_bytes / num_processes / bandwidth)
        tree = 2 * (math.ceil(math.log2(num_processes)) * latency + num_bytes / bandwidth)
        return min(ring, tree)
