"""What concerns the model: beside these files only those that hold a user's model or step know ``nn.Module``.

Which layers there are and whether they are still the same (``discovery``, ``changes``); what their passes leave
(``capture``, ``passes``, ``recorder``, ``gradient_check``); where an inverse is applied within the backward pass
(``backward_application``); and what stands around a model: compilation, wrappers, replaced forwards, autograd.
"""
