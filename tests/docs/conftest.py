"""The modules of the site need packages that only `make docs` installs."""

collect_ignore_glob = ['*.py']
