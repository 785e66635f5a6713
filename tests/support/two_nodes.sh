#!/bin/bash
# Run a command on two "nodes", network namespaces that a cable joins: unshare -Urnm two_nodes.sh COMMAND...
# In the command, NODE stands for 0 or 1; node 0 has the address 10.77.0.1, node 1 has 10.77.0.2.
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
for node in 0 1; do ip netns add node$node; done
ip link add cable0 type veth peer name cable1
for node in 0 1; do
  ip link set cable$node netns node$node
  ip -n node$node addr add 10.77.0.$((node + 1))/24 dev cable$node
  ip -n node$node link set lo up
  ip -n node$node link set cable$node up
done
pids=()
for node in 0 1; do
  GLOO_SOCKET_IFNAME=cable$node nsenter --net=/run/netns/node$node "${@//NODE/$node}" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
