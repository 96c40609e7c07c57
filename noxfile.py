"""Run the tests on every supported version of torch, with its Triton, in environments that stay in .nox/.

nox                                  all versions, as `make versions`
nox -s "versions(2.15)"              one of them: a row of benchmarks/results/versions.csv for each way to run kernels
nox -s "versions(2.15)" -- --ways ptx    one row
"""

from pathlib import Path

import nox

nox.options.reuse_venv = "yes"

VERSIONS = [
    nox.param("3.10", "2.10.0", "3.6.0", id="2.10"),
    nox.param("3.12", "2.11.0", "3.6.0", id="2.11"),
    nox.param("3.11", "2.13.0", "3.7.1", id="2.13"),
    nox.param("3.11", "2.14.1", "3.8.0", id="2.14"),
    nox.param("3.13", "2.15.0", "3.9.0", id="2.15"),
]


@nox.session
@nox.parametrize("python, torch, triton", VERSIONS)
def versions(session, torch, triton):
    # All else as in constraints.txt, but for setuptools, whose version some releases of torch limit.
    lines = Path("constraints.txt").read_text().splitlines()
    others = Path(session.virtualenv.location, "constraints.txt")
    others.write_text("\n".join(line for line in lines if not line.startswith(("torch=", "triton=", "setuptools=", "numpy="))))
    # The interpreter of Triton 3.6 asks numpy for what 2.4 refuses.
    numpy = "numpy<2.4" if triton.startswith("3.6") else next(line for line in lines if line.startswith("numpy="))
    pinned = f"torch=={torch}", f"triton=={triton}; platform_system == 'Linux'", numpy
    session.install("--constraint", str(others), *pinned, "--editable", ".[train,test,bench]")
    session.run("python", "-m", "benchmarks", "versions", *session.posargs)
