"""A Ray cluster of two machines that are really one: two raylets on the loopback interface. Prints its
address, then waits for the end of its standard input."""

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": sys.argv[1]}  # read when ray is imported

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "node_ip_address": "127.0.0.2"})
    cluster.add_node(**node, node_ip_address="127.0.0.3")
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
