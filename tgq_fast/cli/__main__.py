"""`python -m tgq_fast.cli`."""

from tgq_fast.cli import main

if __name__ == "__main__":
    main()
