"""The `remora` command. Any Python that pip installs the SDK for reads this file, so it says what the rest needs."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - the SDK's Pythons come here, too
    sys.exit(
        f"remora: commands need Python 3.11 or newer, this is {sys.version.split()[0]}; `import remora` works here"
    )
