"""`python -m keel`: the command."""

from keel.cli.main import main

if __name__ == "__main__":
    main()
