"""Say what is installed, which path each device takes and why, whether it agrees with float64, and what to do about troubles.

Of torch_sigmoid, torch, Triton and Python; of the compilers and the driver that kernels need; of the caches of compilations,
and whether they can be written; and of the libraries whose models `replace` knows. Exits with 0 if every check agrees, whatever
other troubles there are, and with 1 if not.

--json prints one object with all of it:
  torch_sigmoid, torch, triton, python, torch_cuda, nvidia_driver    versions; null: there is none
  system, machine, nvidia_devices                                    names
  kernels_unavailable, triton_untested                               why; null: they are available, and it is tested
  torch_sees_gpu, python_headers, agrees                             true or false; agrees is that of all checks
  c_compiler, ptxas                                                  path, version; null: not found
  caches                                                             of triton and inductor: path, writable, variable
  slow_settings                                                      variables of the environment
  libraries                                                          name, version, known_versions, is_known, and forms,
                                                                     null without --forms: name, known, found
  devices                                                            device, name, path, reason, and checks: dtype, agrees,
                                                                     errors in ulp, failure
  troubles                                                           trouble, remedy
"""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_sigmoid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--forms", action="store_true", help="read which known code stands in the libraries' source: seconds")
    chosen = parser.parse_args(arguments)
    from . import doctor

    facts = doctor.examine(read_forms=chosen.forms)
    print(doctor.as_json(facts) if chosen.json else doctor.as_text(facts))
    return 0 if facts.agrees else 1


if __name__ == "__main__":
    sys.exit(main())
