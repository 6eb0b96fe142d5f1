# The parts of scripts/slurm-cluster: its files, its network, its daemons, and clearing them up.
# Sourced after common.sh, never run. Touches only namespaces, links and processes that carry its own names.

slurm_run=${BATON_SLURM_RUN:-/var/tmp/baton-slurm-cluster}
slurm_net=${BATON_SLURM_NET:-10.77.0}
slurm_conf=$slurm_run/etc/slurm.conf
slurm_bridge=batonslurm0

# === names ===

# nodeN is known by its number everywhere: address, link, namespace.
node_names() { [ ! -r "$slurm_run/nodes" ] || cat "$slurm_run/nodes"; }
node_count() { node_names | wc -l; }
node_address() { echo "$slurm_net.$((10 + ${1#node}))"; }
link_of() { echo "batonslurm${1#node}"; }
space_of() { echo "baton-$1"; }

# The process that keeps a node's namespaces, or an error.
anchor_of() {
    local pid
    pid=$(cat "$slurm_run/$1/anchor.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null || die "$1 is not up" "scripts/slurm-cluster status"
    echo "$pid"
}

# One start or stop at a time, on the whole machine.
take_lock() {
    exec 9>/run/baton-slurm-cluster.lock
    flock --wait 60 9 || die "another scripts/slurm-cluster has held /run/baton-slurm-cluster.lock for 60 s"
}

# === files ===

write_files() {
    local nodes=$1 number
    # Only a folder with this mark is ever removed.
    [ ! -d "$slurm_run" ] || [ -z "$(ls -A "$slurm_run")" ] || die "$slurm_run holds something else" "set BATON_SLURM_RUN to a folder that is not there yet"
    mkdir -p "$slurm_run"
    touch "$slurm_run/.ours"
    mkdir -p "$slurm_run"/{etc,state,log,munge,gpus}
    chmod 755 "$slurm_run" "$slurm_run"/{etc,munge}
    chmod 700 "$slurm_run/state"
    printf '127.0.0.1 localhost\n%s.1 controller\n' "$slurm_net" >"$slurm_run/etc/hosts"
    for number in $(seq 1 "$nodes"); do
        mkdir -p "$slurm_run/node$number"/{spool,tmp}
        chmod 1777 "$slurm_run/node$number/tmp"
        echo "node$number" >>"$slurm_run/nodes"
        echo "$(node_address "node$number") node$number" >>"$slurm_run/etc/hosts"
    done
    (umask 077 && dd if=/dev/urandom of="$slurm_run/etc/munge.key" bs=128 count=1 status=none)
    : >"$slurm_run/etc/plugstack.conf"
    # Eight GPUs a node in name only, so that --gres and --gpus-per-node are granted and counted: empty files, no devices.
    touch "$slurm_run"/gpus/gpu{0..7}
    echo "Name=gpu File=$slurm_run/gpus/gpu[0-7]" >"$slurm_run/etc/gres.conf"
    printf 'CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n' >"$slurm_run/etc/cgroup.conf"
    write_slurm_conf "$nodes"
}

# Short time-outs, so that a test of a lost node does not take Slurm's usual five minutes. Eight CPUs are claimed per
# node, however many this machine has: config_overrides makes slurmd believe it.
write_slurm_conf() {
    local nodes=$1 memory number
    memory=$(awk '/^MemTotal:/ { print int($2 / 1024) }' /proc/meminfo)
    {
        cat <<TEXT
ClusterName=baton
SlurmctldHost=controller($slurm_net.1)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
AuthInfo=socket=$slurm_run/munge/socket
SlurmUser=root
StateSaveLocation=$slurm_run/state
SlurmctldPidFile=$slurm_run/slurmctld.pid
SlurmctldLogFile=$slurm_run/log/slurmctld.log
SlurmdPidFile=$slurm_run/slurmd.%n.pid
SlurmdLogFile=$slurm_run/log/slurmd.%n.log
SlurmdSpoolDir=$slurm_run/%n/spool
SlurmdParameters=config_overrides
SlurmdTimeout=60
KillWait=10
UnkillableStepTimeout=60
ReturnToService=2
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2
TEXT
        for number in $(seq 1 "$nodes"); do
            echo "NodeName=node$number NodeAddr=$(node_address "node$number") CPUs=8 Gres=gpu:8 RealMemory=$memory State=UNKNOWN"
        done
        echo "PartitionName=batch Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES"
    } >"$slurm_conf"
}

# === network ===

start_network() {
    local nodes=$1 number node
    ip link add "$slurm_bridge" type bridge
    ip link set "$slurm_bridge" alias "$slurm_run"
    ip addr add "$slurm_net.1/24" dev "$slurm_bridge"
    ip link set "$slurm_bridge" up
    for number in $(seq 1 "$nodes"); do
        node=node$number
        ip netns add "$(space_of "$node")"
        ip link add "$(link_of "$node")" type veth peer name eth0 netns "$(space_of "$node")"
        ip link set "$(link_of "$node")" master "$slurm_bridge" up
        ip -n "$(space_of "$node")" addr add "$(node_address "$node")/24" dev eth0
        ip -n "$(space_of "$node")" link set eth0 up
        ip -n "$(space_of "$node")" link set lo up
    done
}

link_state() { ip -br link show "$(link_of "$1")" 2>/dev/null | awk '{ print tolower($2) }'; }

# === daemons ===

start_daemons() {
    local nodes=$1 number
    munged --key-file "$slurm_run/etc/munge.key" --socket "$slurm_run/munge/socket" --pid-file "$slurm_run/munged.pid" \
        --log-file "$slurm_run/log/munged.log" --seed-file "$slurm_run/munge/seed" --num-threads 2 9>&- \
        || die "munged does not start"
    # A host name of its own: slurmctld starts only on the host that slurm.conf names.
    unshare --uts --mount bash -c 'hostname controller; mount --bind "$1/etc/hosts" /etc/hosts; exec slurmctld -c -f "$1/etc/slurm.conf"' \
        _ "$slurm_run" 9>&- || die "slurmctld does not start"
    for number in $(seq 1 "$nodes"); do
        start_anchor "node$number"
        start_slurmd "node$number"
    done
}

start_slurmd() {
    nsenter --target "$(anchor_of "$1")" --net --uts --ipc --mount -- slurmd -N "$1" -f "$slurm_conf" 9>&- \
        || die "slurmd of $1 does not start"
}

# The anchor keeps a node's namespaces while its slurmd comes and goes. Not `ip netns exec`, which mounts another /sys,
# where slurmd finds no cgroups. /tmp is private because Slurm's PMIx plug-in uses fixed names there; /dev/shm because
# two nodes share no memory.
start_anchor() {
    local node=$1 pid_file=$slurm_run/$1/anchor.pid
    nsenter --net="/run/netns/$(space_of "$node")" setsid --fork unshare --uts --ipc --mount bash -euc '
        hostname "$2"
        mount --bind "$1/$2/tmp" /tmp
        mount -t tmpfs -o mode=1777 tmpfs /dev/shm
        mount --bind "$1/etc/hosts" /etc/hosts
        [ ! -d /etc/slurm ] || mount --bind "$1/etc" /etc/slurm
        echo $$ >"$3.new"
        mv "$3.new" "$3"
        exec sleep infinity' _ "$slurm_run" "$node" "$pid_file" </dev/null >"$slurm_run/log/$node.log" 2>&1 9>&-
    until_true 5 test -s "$pid_file" || die "the namespaces of $node cannot be made: $(cat "$slurm_run/log/$node.log")"
}

# A daemon's process id when it lives and is ours: a pid file of a crashed run may name a stranger.
daemon_pid() {
    local pid
    pid=$(cat "$slurm_run/$1.pid" 2>/dev/null) || return 1
    grep -qF "$slurm_run/" "/proc/$pid/cmdline" 2>/dev/null || return 1
    echo "$pid"
}

daemon_state() { daemon_pid "$1" >/dev/null && echo up || echo down; }
slurm_state() { timeout 10 env SLURM_CONF="$slurm_conf" sinfo -h -n "$1" -o %T 2>/dev/null | head -1 || echo unknown; }

# Every daemon of the cluster lives and Slurm can use every node.
is_whole() {
    local node
    daemon_pid munged >/dev/null && daemon_pid slurmctld >/dev/null || return 1
    for node in $(node_names); do
        daemon_pid "slurmd.$node" >/dev/null && [ "$(link_state "$node")" = up ] || return 1
        case $(slurm_state "$node") in idle | mixed | allocated | completing) ;; *) return 1 ;; esac
    done
}

# Lets Slurm use a node again that it has given up.
resume() {
    case $(slurm_state "$1") in
    down* | drain*) SLURM_CONF="$slurm_conf" scontrol update nodename="$1" state=resume || true ;;
    esac
}

# Brings back nodes that were cut off, drained, or lost their slurmd, without ending anyone's jobs.
mend() {
    local node
    daemon_pid munged >/dev/null && daemon_pid slurmctld >/dev/null || return 1
    for node in $(node_names); do
        kill -0 "$(cat "$slurm_run/$node/anchor.pid" 2>/dev/null)" 2>/dev/null || return 1
        ip link set "$(link_of "$node")" up || return 1
        daemon_pid "slurmd.$node" >/dev/null || start_slurmd "$node"
        resume "$node"
    done
    until_true 15 is_whole
}

await_nodes() {
    local nodes=$1
    until_true 15 is_whole || die "not every node came up: $(for node in $(node_names); do echo "$node is $(slurm_state "$node")"; done | paste -sd, -)"
    [ "$nodes" = 1 ] || nsenter --target "$(anchor_of node1)" --net -- bash -c "timeout 5 bash -c '</dev/tcp/$(node_address node2)/16818'" 2>/dev/null \
        || die "node1 cannot reach node2: this machine filters bridged traffic" "try: sysctl net.bridge.bridge-nf-call-iptables=0"
}

# until_true SECONDS COMMAND…: whether it succeeds in time.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# === clearing up ===

# Cancels every job and gives them a moment, so that an srun that waits outside the nodes ends too.
end_jobs() {
    daemon_pid slurmctld >/dev/null || return 0
    timeout 10 env SLURM_CONF="$slurm_conf" scancel --signal=KILL --user="$(id -un)" 2>/dev/null || true
    until_true 5 no_jobs || true
}
no_jobs() { [ -z "$(timeout 10 env SLURM_CONF="$slurm_conf" squeue --noheader --all --format=%A 2>/dev/null)" ]; }

# Processes on a node that are not the cluster's own.
strangers() {
    local pid anchor=
    anchor=$(cat "$slurm_run/$1/anchor.pid" 2>/dev/null || true)
    for pid in $(ip netns pids "$(space_of "$1")" 2>/dev/null); do
        [ "$pid" != "$anchor" ] || continue
        case $(cat "/proc/$pid/comm" 2>/dev/null || echo slurmd) in slurmd | slurmstepd) ;; *) echo "$pid" ;; esac
    done
}

# Namespaces by their names rather than by a list: a run that crashed while it started may have written none.
our_spaces() { ip netns list 2>/dev/null | awk '$1 ~ /^baton-node[0-9]+$/ { print $1 }'; }
our_links() { ip -br link show 2>/dev/null | sed -n 's/^\(batonslurm[0-9]*\)[@ ].*/\1/p'; }
space_processes() { local space; for space in $(our_spaces); do ip netns pids "$space"; done; }
nobody_left() { [ -z "$(space_processes)" ]; }

clear_up() {
    local other space pid name
    command -v ip >/dev/null || return 0
    other=$(ip -o link show "$slurm_bridge" 2>/dev/null | sed -n 's/.*alias //p' || true)
    [ -z "$other" ] || [ "$other" = "$slurm_run" ] || die "a cluster runs from another folder: $other" "stop it with: BATON_SLURM_RUN=$other scripts/slurm-cluster stop"
    for name in slurmctld munged; do
        pid=$(daemon_pid "$name") || continue
        kill -KILL "$pid" 2>/dev/null || true
        until_true 5 not daemon_pid "$name" || die "$name (process $pid) does not end"
    done
    # Jobs, slurmd, anchors: whatever lives in a namespace of ours. New ones may appear until the last parent is gone.
    until_true 10 end_processes || die "processes do not end: $(space_processes | paste -sd' ' -)" "scripts/slurm-cluster status"
    for space in $(our_spaces); do ip netns delete "$space"; done
    for name in $(our_links); do ip link delete "$name" 2>/dev/null || true; done
    [ ! -e "$slurm_run/.ours" ] || rm -rf "$slurm_run"
}

# A start that failed: what the daemons said, then nothing of it stays.
give_up() {
    tail -n 5 "$slurm_run"/log/* >&2 || true
    clear_up
}

not() { ! "$@" >/dev/null; }

end_processes() {
    local pid
    for pid in $(space_processes); do kill -KILL "$pid" 2>/dev/null || true; done
    nobody_left
}
