# Puts a file into a library as SYMBOL[] with SYMBOL_len beside it, by the assembler's .incbin.
function(airlock_embed target symbol file)
  set(asm ${CMAKE_BINARY_DIR}/embed/${symbol}.S)
  file(WRITE ${asm} ".section .rodata\n.global ${symbol}\n.global ${symbol}_len\n${symbol}:\n.incbin \"${file}\"\n.set end, .\n.byte 0\n.balign 8\n${symbol}_len:\n.quad end - ${symbol}\n.section .note.GNU-stack,\"\",@progbits\n")
  set_source_files_properties(${asm} PROPERTIES OBJECT_DEPENDS ${file} LANGUAGE ASM)
  target_sources(${target} PRIVATE ${asm})
endfunction()
