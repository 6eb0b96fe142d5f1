# Shared by the scripts of this folder: messages, the toolchain check, system packages, the cache.
# Sourced, never run. Needs bash. Talks on stderr.

baton_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
baton_cache="${XDG_CACHE_HOME:-$HOME/.cache}/baton"
baton_yes=${baton_yes:-no}

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$1" >&2; [ $# -lt 2 ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

# The one thing these scripts do not install: a Rust toolchain belongs to its user.
need_rust() {
    [ -x "$HOME/.cargo/bin/cargo" ] && PATH="$HOME/.cargo/bin:$PATH"
    command -v cargo >/dev/null || die "no Rust toolchain (cargo) on this machine" \
        "install it with: curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y"
}

# need_packages NAME…: Debian or Ubuntu packages, asked for once; nothing happens when all are there.
need_packages() {
    local missing=() name
    command -v dpkg-query >/dev/null || die "this script installs packages on Debian and Ubuntu only" "install by hand: $*"
    for name in "$@"; do
        dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "$baton_yes" != yes ]; then
        [ -t 0 ] || die "system packages are missing: ${missing[*]}" "run again with --yes to install them"
        read -r -p "install system packages: ${missing[*]}? [Y/n] " answer
        case $answer in ''|y|Y|yes) ;; *) die "not installed: ${missing[*]}" "apt-get install ${missing[*]}" ;; esac
    fi
    local sudo=()
    [ "$(id -u)" = 0 ] || sudo=(sudo)
    say "installing ${missing[*]}"
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -q >&2
    "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${missing[@]}" >&2
}

# need_venv PACKAGE…: a Python environment in the cache that holds these packages (name==version each); prints its folder.
need_venv() {
    local venv="$baton_cache/python" want have="$baton_cache/python/.baton-packages" package
    mkdir -p "$baton_cache"
    [ -x "$venv/bin/pip" ] || { rm -rf "$venv"; python3 -m venv "$venv" >&2 || die "cannot make a Python environment in $venv"; }
    touch "$have"
    for package in "$@"; do
        grep -qxF "$package" "$have" && continue
        say "installing the Python package $package"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$package" >&2 || die "cannot install $package" "is the package index reachable?"
        echo "$package" >>"$have"
    done
    echo "$venv"
}
