"""`dts lm-eval`: the command of lm-evaluation-harness, in which `--model dts` is known.

    dts lm-eval --model dts --model_args pretrained=smollm2-135m,method=maxent-star,rollouts=16 --tasks TASK

The harness finds models of other packages by the entry point `lm_eval.models` since its plug-ins (September 2026);
`lm_eval --model dts` is enough there. Releases up to 0.4.13 have no such place: this command registers the model by the
harness's public registry and calls the harness's own main function with the options as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dts.errors import DTSError

HOME = "dts.doors.harness:SearchLM"


def register() -> None:
    """Make `dts` a model of the harness, unless it found the entry point itself."""
    import lm_eval.models  # noqa: F401  # fills the registry, which would otherwise hold ours alone
    from lm_eval.api.registry import model_registry

    if "dts" not in model_registry:
        model_registry.register("dts", target=HOME)


def main(argv: Sequence[str]) -> int:
    """The exit code: 2 where the harness is not installed, or an option of ours cannot be used."""
    wants_help = bool({"-h", "--help"}.intersection(argv))
    if wants_help:
        print(__doc__)
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        if wants_help:
            raise SystemExit(0) from error
        print(f"error: lm_eval cannot be imported ({error}); run: pip install 'maxent-decoding[lm-eval]'",
              file=sys.stderr)  # fmt: skip
        return 2
    given, sys.argv = sys.argv, ["lm_eval", *argv]  # the harness reads its options there
    try:
        cli_evaluate()
    except DTSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    finally:
        sys.argv = given
    return 0
