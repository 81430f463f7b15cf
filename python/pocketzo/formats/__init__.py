"""The file formats that PocketZO writes: bundle, safetensors, journal, snapshot."""
