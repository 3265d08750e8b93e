"""The tensor-parallel executor that both chapters stand on."""
