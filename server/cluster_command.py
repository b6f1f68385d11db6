"""`livebrush cluster`: this machine as a node of a Ray cluster, what runs on the nodes, and emptying one of them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of a Ray cluster's head, unless told otherwise.
PORT = 6379


def add_cluster_parser(commands: Any) -> None:
    """Add the command to the console script."""
    parser = commands.add_parser("cluster", help="a Ray cluster: start a node, show what runs, empty a node")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    up = actions.add_parser("up", help="make this machine a node, until `ray stop`")
    up.add_argument("--join", metavar="HOST:PORT", help="of a cluster there is (default: begin one here)")
    up.add_argument("--port", type=int, default=PORT, help=f"to begin one at (default: {PORT})")
    up.add_argument("--host", help="this machine's address in the cluster (default: what Ray finds, never loopback)")
    up.add_argument("--cpus", type=int, help="ranks this node takes without a GPU (default: its cores)")
    up.add_argument("--gpus", type=int, help="ranks it takes with one (default: its GPUs)")
    up.set_defaults(command=_up)
    status = actions.add_parser("status", help="the nodes, and the groups of every server")
    status.set_defaults(command=_status)
    drain = actions.add_parser("drain", help="have the groups of a node go elsewhere, and place none there")
    drain.add_argument("node", help="the first characters of its id, as `status` shows it")
    drain.add_argument("--undo", action="store_true", help="use the node again")
    drain.set_defaults(command=_drain)


def _up(options: argparse.Namespace) -> int:
    from engine.ray_cluster import STORE_BYTES, import_ray

    try:
        import_ray()
    except OSError as error:
        return _fail(str(error))
    command = [str(Path(sys.executable).with_name("ray")), "start", "--disable-usage-stats"]
    command += [f"--object-store-memory={STORE_BYTES}"]
    command += [f"--node-ip-address={options.host}"] if options.host else []
    if options.join:
        command.append(f"--address={options.join}")
    else:
        command += ["--head", f"--port={options.port}", "--include-dashboard=false"]
    command += [f"--num-cpus={options.cpus}"] if options.cpus is not None else []
    command += [f"--num-gpus={options.gpus}"] if options.gpus is not None else []
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        return _fail(f"Ray did not start:\n{(done.stderr or done.stdout).strip()}")
    place = options.join or f"{options.host or 'THIS-MACHINE'}:{options.port}"
    print(f"This machine is a node of the cluster at {place}. `ray stop` ends it.")
    if not options.join:
        print(f"More nodes: livebrush cluster up --join {place}     Serve: livebrush serve --engine ray")
    return 0


def _status(options: argparse.Namespace) -> int:
    try:
        ray = _connect()
    except OSError as error:
        return _fail(str(error))
    from engine.ray_cluster import CALL_TIMEOUT_S, controller

    handle = controller(ray)
    groups, drained = ray.get([handle.groups.remote(), handle.drained.remote()], timeout=CALL_TIMEOUT_S)
    for node in ray.nodes():
        needs = {name: node["Resources"].get(name, 0) for name in ("CPU", "GPU")}
        state = "gone" if not node["Alive"] else "drained" if node["NodeID"] in drained else "up"
        room = ", ".join(f"{count:g} {name}" for name, count in needs.items() if count) or "no room for groups"
        print(f"node {node['NodeID'][:12]}  {node['NodeManagerAddress']}  {state}  {room}")
        for group in groups:
            if group["node"] == node["NodeID"]:
                print(f"  group {group['group']} of {group['server']}: {group['state']}, {group['streams']} streams")
    for group in groups:
        if not group["node"]:
            print(f"group {group['group']} of {group['server']} has no node: {group['state']}")
    ray.shutdown()
    return 0


def _drain(options: argparse.Namespace) -> int:
    try:
        ray = _connect()
    except OSError as error:
        return _fail(str(error))
    from engine.ray_cluster import CALL_TIMEOUT_S, controller

    found = [node["NodeID"] for node in ray.nodes() if node["NodeID"].startswith(options.node)]
    if len(found) != 1:
        ray.shutdown()
        return _fail(f"{len(found)} nodes have ids that begin with {options.node!r}; see livebrush cluster status")
    ray.get(controller(ray).drain.remote(found[0], not options.undo), timeout=CALL_TIMEOUT_S)
    print(f"node {found[0][:12]} {'is used again' if options.undo else 'is drained: its groups leave within seconds'}")
    ray.shutdown()
    return 0


def _connect() -> Any:
    """The Ray cluster that this machine is a node of, or RAY_ADDRESS names. Raises OSError where there is none."""
    from engine.ray_cluster import NAMESPACE, import_ray

    ray = import_ray()
    try:
        ray.init("auto", namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except ConnectionError as error:
        raise ConnectionError("this machine is in no Ray cluster: livebrush cluster up") from error
    return ray


def _fail(message: str) -> int:
    print("\n".join(f"livebrush: {line}" for line in message.splitlines()), file=sys.stderr)
    return 1
