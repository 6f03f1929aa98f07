"""Read the numbers that people have written, on photos and scans.

accelerate launch jobs/read.py --run runs/NAME photo.jpg scans/    # files, and folders of them
scripts/read --processes 2 --model FILE photos/                    # two processes
"""

import sys

from mnist.system import die_with_launcher, end_quietly_when_interrupted

if __name__ == "__main__":
    end_quietly_when_interrupted()  # before what takes long to import
    from mnist.cli import exit_codes
    from mnist.reading.config import parse_read_config

    with exit_codes("read.py"):
        die_with_launcher()
        config = parse_read_config(sys.argv[1:])
        from mnist.threads import surroundings

        surroundings()  # before torch is imported
        from mnist.reading.job import read

        read(config)
