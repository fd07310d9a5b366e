"""``python -m vllm_slimspec`` is ``slimspec``, for where no script was installed."""

import sys

from vllm_slimspec.cli import main

sys.argv[0] = "slimspec"
main()
