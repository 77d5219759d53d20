"""The preconditioner's side of a model: the only files, beside the class itself, that know ``nn.Module``.

Which layers there are and whether they are still the same (``discovery``, ``changes``); what their passes leave
(``capture``, ``passes``, ``recorder``, ``gradient_check``); where an inverse is applied within the backward pass
(``backward_application``); and what stands around a model: compilation, wrappers, replaced forwards, autograd.
"""
