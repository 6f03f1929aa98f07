"""Write a trained model as a file that needs nothing of this package.

scripts/export --run runs/NAME --format onnx                  # for ONNX Runtime and others
scripts/export --run runs/NAME --format html                  # a page to draw digits on
"""

import sys

from mnist.system import end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
    from mnist.cli import exit_codes
    from mnist.export.config import parse_export_config

    with exit_codes("export"):
        config = parse_export_config(sys.argv[1:])
        from mnist.export.job import export

        export(config)
