"""A Ray cluster of two machines that are really one: two raylets on the loopback interface, with one CPU each
or as many as two more arguments say. Prints its address, then waits for the end of its standard input."""

import os
import sys

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": sys.argv[1]}  # read when ray is imported

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    head, other = map(int, sys.argv[2:] or (1, 1))
    node = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    first = {**node, "num_cpus": head, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    cluster.add_node(**node, num_cpus=other, node_ip_address="127.0.0.3")
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
