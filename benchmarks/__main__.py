"""`python -m benchmarks`: the speed of an edit, by type; other programs are run by their files."""

from benchmarks import edit_speed

if __name__ == "__main__":
    edit_speed.main()
