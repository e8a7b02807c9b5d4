"""An IPython extension in every kernel of the suite: errors that Jupyter ignores make the notebook fail.

Without it, an exception in a thread ends only that thread, and a failing shell command (``!command``) has no effect.
"""

import sys
import threading

from lowbit_suite.records import record


def load_ipython_extension(shell) -> None:
    """Called by IPython when the kernel starts."""
    shown = threading.excepthook

    def thread_died(args) -> None:
        if args.exc_type is not SystemExit and not sys.is_finalizing():
            name = args.thread.name if args.thread else "a thread"
            record.complain(f"{args.exc_type.__name__}: {args.exc_value} ended {name}, and the notebook went on")
        shown(args)

    def cell_ended(result) -> None:
        if code := shell.user_ns.get("_exit_code"):  # IPython sets it after !command
            record.complain(f"a shell command left with exit code {code}, and the notebook went on")

    threading.excepthook = thread_died
    shell.events.register("post_run_cell", cell_ended)
