"""Makes the folder of a kernel for `attn_implementation="owner/kernel"`: DropKey for stock models of Transformers.

    python scripts/build_kernel.py dropkey-attention --repo_id owner/dropkey-attention

Upload the folder as a repository of the type "kernel", branch v1, or try it at once (needs the `kernels` library):

    LOCAL_KERNELS=owner/dropkey-attention=$PWD/dropkey-attention python train.py
"""

import argparse
from pathlib import Path

from hf_dropkey.hub.kernel_folder import build_kernel


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--repo_id", required=True, help="owner/name of the repository, which the card names")
    arguments = parser.parse_args()
    try:
        files = build_kernel(arguments.folder, arguments.repo_id)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(str(error)) from None
    print(f"{len(files)} files in {arguments.folder}")


if __name__ == "__main__":
    main()
