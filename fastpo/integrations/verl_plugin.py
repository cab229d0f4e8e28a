"""Entry point `verl.plugins`: importing this module installs fastpo into verl, in every process.

verl imports it while `import verl` runs and hides what goes wrong at debug level; so it is logged
here as well.
"""

import logging

from fastpo.integrations import verl

try:
    verl.install()
except Exception as error:
    logging.getLogger(__name__).warning("fastpo could not install itself into verl: %s", error)
    raise
