"""What a backbone computes: the nano networks, and our forward passes in place of Hugging Face's. `rankmamba.backbones` loads one."""
