# Install what only a compiled engine needs, in the stage of the image that builds the wheel: mypyc, and, where they are
# missing, a C compiler and Python's headers. What cannot be installed is left out: then hatch_build.py makes the pure
# wheel and says why in one line, or fails with COMPILED_ENGINE=required.
set -u
[ "${COMPILED_ENGINE:-0}" != 0 ] || exit 0

# shellcheck disable=SC2046 # one word for each requirement
python3 -m pip --python /opt/tools/bin/python install -q --no-compile --only-binary=:all: -c constraints.txt $(
    python3 -c 'import tomllib
build = tomllib.load(open("pyproject.toml", "rb"))["tool"]["hatch"]["build"]
print(*build["targets"]["wheel"]["hooks"]["custom"]["requires"])'
)

packages=$(python3 -c 'import os, shlex, shutil, sysconfig
if shutil.which(shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]) is None:
    print("gcc libc6-dev")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3-dev")  # of Debian; other builds of Python have their headers
')
if [ -n "$packages" ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt() { apt-get -qq -o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10 "$@" >/dev/null; }
    # shellcheck disable=SC2086 # one word for each package
    apt -o APT::Update::Error-Mode=any update && apt install --no-install-recommends $packages
fi
exit 0
