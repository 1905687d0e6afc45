"""Write what mmdet3d wants to know of SemanticKITTI scans: NAME.bin and NAME.label beside each other in one folder.

Example: python prepare_scans.py data/semantickitti 000000 000001
"""

import argparse
import pickle
from pathlib import Path


def describe(folder: Path, names: list[str]) -> dict:
    """The contents of an info file.

    Raises:
        FileNotFoundError: a scan or its labels are not there.
    """
    for path in (folder / f"{name}.{kind}" for name in names for kind in ("bin", "label")):
        if not path.is_file():
            raise FileNotFoundError(path)
    return {
        "metainfo": {"DATASET": "SemanticKITTI"},
        "data_list": [
            {
                "sample_id": name,
                "lidar_points": {"lidar_path": f"{name}.bin", "num_pts_feats": 4},
                "pts_semantic_mask_path": f"{name}.label",
            }
            for name in names
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the scans are; scans.pkl is written there, or to --out")
    parser.add_argument("names", nargs="+", help="of the scans, without suffix")
    parser.add_argument("--out", type=Path, help="another place for the info file")
    chosen = parser.parse_args()
    out = chosen.out or chosen.folder / "scans.pkl"
    out.write_bytes(pickle.dumps(describe(chosen.folder, chosen.names)))
    print(f"{out}: {len(chosen.names)} scans")


if __name__ == "__main__":
    main()
