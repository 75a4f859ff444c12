"""What every package stands on: errors, settings, storage, the command line; knows no images."""
